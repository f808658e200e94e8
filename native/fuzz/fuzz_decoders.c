/* Fuzz everything that decodes a node or a delta. The input is copied into a block of exactly its size, so that a
 * sanitizer sees a read past it, and accepted bytes must satisfy what acceptance promises. */
#include <stdlib.h>
#include <string.h>

#include "../merkle.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int condition)
{
    if (!condition)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t BOUNDS[JBM_BOUNDS_BYTES];
    jbm_buffer first = {0}, second = {0};
    uint32_t counts[2], again[2];
    uint8_t hash[JBM_HASH_BYTES];
    uint8_t *block = malloc(size > 0 ? size : 1);
    const uint8_t *view = block;

    if (block == NULL)
        return 0;
    memcpy(block, data, size);
    must(jbm_check_node(block, size) == jbm_node_hash(block, size, BOUNDS, 32, BOUNDS, JBM_BOUNDS_BYTES, hash));
    if (jbm_delta_index(block, size, counts, &first) == JBM_OK) {
        must(jbm_delta_rows(block, size, again, &second) == JBM_OK && memcmp(counts, again, sizeof counts) == 0);
        must(jbm_squash(&view, &size, 1, &first) == JBM_OK); /* one delta squashes to itself */
        must(first.size == size && memcmp(first.data, block, size) == 0);
    }
    jbm_buffer_free(&first);
    jbm_buffer_free(&second);
    free(block);
    return 0;
}
