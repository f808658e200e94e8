/* Fuzz proofs against a tree at whatever root and range they claim, as a merge's foreign proof may.
 * Input: an optional second proof after the first, split at a length in the first two bytes. */
#include <stdlib.h>
#include <string.h>

#include "../merkle.h"

enum { BOUNDS_AT = 34, ROOT_AT = 98, HEADER = 130 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t *block_of(const uint8_t *data, size_t size)
{
    uint8_t *block = malloc(size > 0 ? size : 1);

    if (block != NULL && size > 0)
        memcpy(block, data, size);
    return block;
}

/* Everything a tree does with one proof, and a merge with the other. */
static void exercise(jbm_tree *tree, const uint8_t *proof, size_t size, const uint8_t *other, size_t other_size)
{
    uint8_t root[2 * JBM_HASH_BYTES], end[JBM_BOUNDS_BYTES], before[JBM_HASH_BYTES], after[JBM_HASH_BYTES];
    jbm_buffer delta = {0};
    jbm_path *path = NULL;
    size_t value_size = 0;

    (void)jbm_tree_root(tree, before);
    (void)jbm_tree_split(tree, proof, size, root, end, &delta);
    if (other_size >= HEADER)
        (void)jbm_tree_merge(tree, proof, size, other, other_size, other + ROOT_AT, JBM_HASH_BYTES, other + BOUNDS_AT,
                             JBM_BOUNDS_BYTES, root, end, &delta);
    (void)jbm_tree_root(tree, after);
    if (memcmp(before, after, sizeof before) != 0)
        abort(); /* neither moves the tree */
    if (jbm_tree_latest(tree, proof, size, &path) == JBM_OK) {
        (void)jbm_path_value(path, &value_size);
        if (jbm_tree_update(tree, proof, size, proof, size % 100, root, &delta) != JBM_OK)
            abort(); /* what can be refreshed can be written */
        (void)jbm_tree_insert(tree, path, proof, 3, root, &delta);
        (void)jbm_tree_update(tree, proof, size, proof, 5, root, &delta);
        jbm_path_free(path);
    }
    jbm_buffer_free(&delta);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t first_size = size < 2 ? 0 : (size_t)data[0] << 8 | data[1];
    uint8_t *first, *second;
    jbm_tree *tree = NULL;

    if (size < 2)
        return 0;
    data += 2;
    size -= 2;
    first_size = first_size < size ? first_size : size;
    first = block_of(data, first_size);
    second = block_of(data + first_size, size - first_size);
    if (first != NULL && second != NULL && first_size >= HEADER &&
        jbm_tree_new(first + ROOT_AT, JBM_HASH_BYTES, first + BOUNDS_AT, JBM_BOUNDS_BYTES, 1, &tree) == JBM_OK)
        exercise(tree, first, first_size, second, size - first_size);
    jbm_tree_free(tree);
    free(first);
    free(second);
    return 0;
}
