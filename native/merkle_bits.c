/* Bit strings, most significant bit first. */
#include "merkle_parts.h"

#include <string.h>

/* Up to 8 bits of `bits` from `pos` on, left-aligned; touches no byte beyond the last bit asked for. */
static unsigned window(const uint8_t *bits, size_t pos, size_t take)
{
    size_t shift = pos & 7;
    unsigned byte = (unsigned)bits[pos >> 3] << shift;

    if (shift + take > 8)
        byte |= (unsigned)bits[(pos >> 3) + 1] >> (8 - shift);
    return byte & 0xFFu & (0xFF00u >> take);
}

static size_t at_most_8(size_t rest)
{
    return rest < 8 ? rest : 8;
}

size_t bits_common(const uint8_t *a, size_t from, const uint8_t *b, size_t nbits)
{
    for (size_t at = 0; at < nbits; at += 8) {
        size_t take = at_most_8(nbits - at);
        unsigned differ = window(a, from + at, take) ^ window(b, at, take);

        if (differ != 0) {
            while ((differ & 0x80u) == 0) {
                differ <<= 1;
                at++;
            }
            return at;
        }
    }
    return nbits;
}

int bits_compare(const uint8_t *a, size_t a_bits, const uint8_t *b, size_t b_bits)
{
    size_t both = a_bits < b_bits ? a_bits : b_bits;
    size_t common = a == b ? both : bits_common(a, 0, b, both);

    if (common < both)
        return bit_at(a, common) != 0 ? 1 : -1;
    return a_bits < b_bits ? -1 : a_bits > b_bits;
}

void bits_extract(uint8_t *to, const uint8_t *from, size_t at, size_t nbits)
{
    for (size_t done = 0; done < nbits; done += 8)
        to[done >> 3] = (uint8_t)window(from, at + done, at_most_8(nbits - done));
}

void bits_append(uint8_t *to, size_t at, const uint8_t *from, size_t nbits)
{
    for (size_t done = 0; done < nbits; done += 8) {
        size_t take = at_most_8(nbits - done);
        size_t shift = (at + done) & 7;
        unsigned byte = window(from, done, take);
        uint8_t *target = to + ((at + done) >> 3);

        target[0] = (uint8_t)(target[0] | byte >> shift);
        if (shift + take > 8)
            target[1] = (uint8_t)(target[1] | byte << (8 - shift));
    }
}

size_t bits_base128(uint8_t *to, const uint8_t *bits, size_t nbits)
{
    size_t size = 0, last = 0;

    for (size_t at = 0; at < nbits; at += 7) {
        last = nbits - at < 7 ? nbits - at : 7;
        to[size++] = (uint8_t)(window(bits, at, last) >> 1);
    }
    to[size++] = (uint8_t)(0x80u | last);
    return size;
}

bool bits_padded(const uint8_t *bits, size_t nbits)
{
    size_t used = nbits & 7;

    return used == 0 || (bits[nbits >> 3] & (0xFFu >> used)) == 0;
}
