#include "blake3.h"

#include <string.h>

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };
enum { BLOCKS_PER_CHUNK = 16 };

static const uint32_t IV[8] = {
    0x6A09E667u, 0xBB67AE85u, 0x3C6EF372u, 0xA54FF53Au, 0x510E527Fu, 0x9B05688Cu, 0x1F83D9ABu, 0x5BE0CD19u,
};

static uint32_t load32(const uint8_t *from)
{
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

static void store32(uint8_t *to, uint32_t word)
{
    to[0] = (uint8_t)word;
    to[1] = (uint8_t)(word >> 8);
    to[2] = (uint8_t)(word >> 16);
    to[3] = (uint8_t)(word >> 24);
}

#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))

#define G(a, b, c, d, x, y)          \
    do {                             \
        a += b + (x);                \
        d = ROTR(d ^ a, 16);         \
        c += d;                      \
        b = ROTR(b ^ c, 12);         \
        a += b + (y);                \
        d = ROTR(d ^ a, 8);          \
        c += d;                      \
        b = ROTR(b ^ c, 7);          \
    } while (0)

/* One round over the message words in the given order: four columns, then four diagonals. */
#define ROUND(i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15) \
    do {                                                                            \
        G(v0, v4, v8, v12, m[i0], m[i1]);                                           \
        G(v1, v5, v9, v13, m[i2], m[i3]);                                           \
        G(v2, v6, v10, v14, m[i4], m[i5]);                                          \
        G(v3, v7, v11, v15, m[i6], m[i7]);                                          \
        G(v0, v5, v10, v15, m[i8], m[i9]);                                          \
        G(v1, v6, v11, v12, m[i10], m[i11]);                                        \
        G(v2, v7, v8, v13, m[i12], m[i13]);                                         \
        G(v3, v4, v9, v14, m[i14], m[i15]);                                         \
    } while (0)

/* Compress one 64-byte block into `chain`. The round orders are the paper's permutation applied 0 to 6 times. */
static void compress(uint32_t chain[8], const uint8_t *block, uint32_t size, uint64_t counter, uint32_t flags)
{
    uint32_t m[16];
    uint32_t v0 = chain[0], v1 = chain[1], v2 = chain[2], v3 = chain[3];
    uint32_t v4 = chain[4], v5 = chain[5], v6 = chain[6], v7 = chain[7];
    uint32_t v8 = IV[0], v9 = IV[1], v10 = IV[2], v11 = IV[3];
    uint32_t v12 = (uint32_t)counter, v13 = (uint32_t)(counter >> 32), v14 = size, v15 = flags;

    for (size_t i = 0; i < 16; i++)
        m[i] = load32(block + 4 * i);

    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);

    chain[0] = v0 ^ v8;
    chain[1] = v1 ^ v9;
    chain[2] = v2 ^ v10;
    chain[3] = v3 ^ v11;
    chain[4] = v4 ^ v12;
    chain[5] = v5 ^ v13;
    chain[6] = v6 ^ v14;
    chain[7] = v7 ^ v15;
}

/* Replace `left` by the chaining value of the parent of `left` and `right`. */
static void join(uint32_t left[8], const uint32_t right[8], uint32_t flags)
{
    uint8_t block[BLAKE3_BLOCK_BYTES];

    for (size_t i = 0; i < 8; i++) {
        store32(block + 4 * i, left[i]);
        store32(block + 32 + 4 * i, right[i]);
    }
    memcpy(left, IV, sizeof IV);
    compress(left, block, BLAKE3_BLOCK_BYTES, 0, PARENT | flags);
}

void blake3_start(blake3_state *state)
{
    memcpy(state->chain, IV, sizeof IV);
    state->chunk = 0;
    state->block_size = 0;
    state->blocks_done = 0;
    state->stack_size = 0;
}

static uint32_t start_flag(const blake3_state *state)
{
    return state->blocks_done == 0 ? CHUNK_START : 0;
}

/* The chunk is complete and more input follows: join it with every waiting subtree of its own size. */
static void close_chunk(blake3_state *state)
{
    uint64_t finished = state->chunk + 1;

    compress(state->chain, state->block, state->block_size, state->chunk, start_flag(state) | CHUNK_END);
    for (; (finished & 1) == 0; finished >>= 1) {
        uint32_t *left = state->stack[--state->stack_size];
        join(left, state->chain, 0);
        memcpy(state->chain, left, sizeof state->chain);
    }
    memcpy(state->stack[state->stack_size++], state->chain, sizeof state->chain);
    memcpy(state->chain, IV, sizeof IV);
    state->chunk++;
    state->block_size = 0;
    state->blocks_done = 0;
}

void blake3_update(blake3_state *state, const uint8_t *input, size_t size)
{
    while (size > 0) {
        size_t room = BLAKE3_BLOCK_BYTES - state->block_size;
        size_t taken = size < room ? size : room;

        if (room == 0) {
            if (state->blocks_done == BLOCKS_PER_CHUNK - 1) {
                close_chunk(state);
            } else {
                compress(state->chain, state->block, BLAKE3_BLOCK_BYTES, state->chunk, start_flag(state));
                state->blocks_done++;
                state->block_size = 0;
            }
            continue;
        }
        memcpy(state->block + state->block_size, input, taken);
        state->block_size = (uint8_t)(state->block_size + taken);
        input += taken;
        size -= taken;
    }
}

void blake3_finish(const blake3_state *state, uint8_t out[BLAKE3_OUT_BYTES])
{
    uint8_t block[BLAKE3_BLOCK_BYTES] = {0};
    uint32_t chain[8];
    uint32_t flags = start_flag(state) | CHUNK_END;
    size_t waiting = state->stack_size;

    memcpy(chain, state->chain, sizeof chain);
    memcpy(block, state->block, state->block_size);
    compress(chain, block, state->block_size, state->chunk, waiting == 0 ? flags | ROOT : flags);
    while (waiting > 0) {
        uint32_t left[8];
        memcpy(left, state->stack[--waiting], sizeof left);
        join(left, chain, waiting == 0 ? ROOT : 0);
        memcpy(chain, left, sizeof chain);
    }
    for (size_t i = 0; i < 8; i++)
        store32(out + 4 * i, chain[i]);
}

void blake3_short(const uint8_t *input, size_t size, uint8_t out[BLAKE3_OUT_BYTES])
{
    uint8_t block[BLAKE3_BLOCK_BYTES] = {0};
    uint32_t chain[8];
    uint32_t flags = CHUNK_START;

    memcpy(chain, IV, sizeof chain);
    while (size > BLAKE3_BLOCK_BYTES) {
        compress(chain, input, BLAKE3_BLOCK_BYTES, 0, flags);
        flags = 0;
        input += BLAKE3_BLOCK_BYTES;
        size -= BLAKE3_BLOCK_BYTES;
    }
    memcpy(block, input, size);
    compress(chain, block, (uint32_t)size, 0, flags | CHUNK_END | ROOT);
    for (size_t i = 0; i < 8; i++)
        store32(out + 4 * i, chain[i]);
}
