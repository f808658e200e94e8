/* BLAKE3-256 in plain mode, portable C, written from the BLAKE3 paper (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020,
 * section 2). No keyed mode, no extended output, no SIMD: a node is two or three blocks, where SIMD over chunks
 * has nothing to work on. */
#ifndef JBM_BLAKE3_H
#define JBM_BLAKE3_H

#include <stddef.h>
#include <stdint.h>

#define BLAKE3_OUT_BYTES 32
#define BLAKE3_BLOCK_BYTES 64
#define BLAKE3_STACK_MAX 54 /* a 2^64 byte input has 2^54 chunks, so at most 54 finished subtrees wait */

typedef struct {
    uint32_t chain[8];                   /* chaining value of the chunk in progress */
    uint32_t stack[BLAKE3_STACK_MAX][8]; /* finished subtrees waiting for their right sibling, largest first */
    uint64_t chunk;                      /* index of the chunk in progress */
    uint8_t block[BLAKE3_BLOCK_BYTES];   /* bytes of the chunk not yet compressed; the last block is held back */
    uint8_t block_size;
    uint8_t blocks_done; /* of this chunk, 0..15 */
    uint8_t stack_size;
} blake3_state;

void blake3_start(blake3_state *state);
void blake3_update(blake3_state *state, const uint8_t *input, size_t size);
void blake3_finish(const blake3_state *state, uint8_t out[BLAKE3_OUT_BYTES]);

/* Hash one input of at most 1024 bytes (a single chunk), which every interior node is. */
void blake3_short(const uint8_t *input, size_t size, uint8_t out[BLAKE3_OUT_BYTES]);

#endif
