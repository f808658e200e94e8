/* Let every allocation of a scenario fail once: the call says so, the tree is as it was, and a retry succeeds.
 * Argument: a file with a valid proof. Link with -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../merkle.h"

enum { BOUNDS_AT = 34, ROOT_AT = 98 };

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *old, size_t size);

static int countdown; /* the allocation that fails; 0: none */

static int fails(void)
{
    return countdown > 0 && --countdown == 0;
}

void *__wrap_malloc(size_t size)
{
    return fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return fails() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *old, size_t size)
{
    return fails() ? NULL : __real_realloc(old, size);
}

static void must(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "out_of_memory: %s\n", what);
        exit(1);
    }
}

/* Run every call that allocates, the `failing`-th allocation failing; return whether one was reached. */
static int scenario(const uint8_t *proof, size_t size, int failing)
{
    uint8_t root[JBM_HASH_BYTES], before[JBM_HASH_BYTES], roots[2 * JBM_HASH_BYTES], end[JBM_KEY_BYTES];
    jbm_buffer delta = {0}, output = {0};
    jbm_tree *tree = NULL;
    jbm_path *path = NULL;
    uint32_t counts[2];
    int failed = 0;
    const uint8_t *view;
    size_t view_size;

/* Retry a call until it succeeds, which must be at once or after the one failure. */
#define ALLOCATES(call)                                    \
    do {                                                   \
        jbm_status status = (call);                        \
        if (status == JBM_NO_MEMORY) {                     \
            failed++;                                      \
            if (tree != NULL) {                            \
                (void)jbm_tree_root(tree, root);           \
                must(memcmp(root, before, 32) == 0, #call); \
            }                                              \
            status = (call);                               \
        }                                                  \
        must(status == JBM_OK, #call);                     \
        if (tree != NULL)                                  \
            (void)jbm_tree_root(tree, before);             \
    } while (0)

    countdown = failing;
    ALLOCATES(jbm_tree_new(proof + ROOT_AT, 32, proof + BOUNDS_AT, 64, 2, &tree));
    for (uint8_t value = 0; value < 3; value++) /* the proof is against the oldest root in the window by then */
        ALLOCATES(jbm_tree_update(tree, proof, size, &value, 1, root, &delta));
    jbm_tree_free(tree);
    tree = NULL;
    ALLOCATES(jbm_tree_new(proof + ROOT_AT, 32, proof + BOUNDS_AT, 64, 2, &tree));
    ALLOCATES(jbm_tree_latest(tree, proof, size, &path));
    ALLOCATES(jbm_tree_split(tree, proof, size, roots, end, &delta));
    ALLOCATES(jbm_tree_insert(tree, path, proof, 100, root, &delta));
    ALLOCATES(jbm_tree_valid_roots(tree, &output));
    must(output.size == 64, "two valid roots");
    jbm_path_free(path);
    view = delta.data;
    view_size = delta.size;
    jbm_buffer_free(&output);
    ALLOCATES(jbm_delta_index(view, view_size, counts, &output));
    jbm_buffer_free(&output);
    ALLOCATES(jbm_delta_rows(view, view_size, counts, &output));
    jbm_buffer_free(&output);
    ALLOCATES(jbm_squash(&view, &view_size, 1, &output));
    must(output.size == view_size && memcmp(output.data, view, view_size) == 0, "squash of one delta");
    jbm_buffer_free(&output);
    ALLOCATES(jbm_path_scan_starts(proof + 2, 32, 0, &output));
    jbm_buffer_free(&output);
    ALLOCATES(jbm_empty_root(proof + BOUNDS_AT, 64, root, &output));
    jbm_buffer_free(&output);
    jbm_buffer_free(&delta);
    jbm_tree_free(tree);
    countdown = 0;
    must(failed <= 1, "one failure at most");
    return failed;
}

int main(int count, char **names)
{
    static uint8_t data[1 << 16];
    FILE *file = count == 2 ? fopen(names[1], "rb") : NULL;
    size_t size;
    int failing = 1;

    must(file != NULL, "usage: out_of_memory PROOF");
    size = fread(data, 1, sizeof data, file);
    fclose(file);
    while (scenario(data, size, failing))
        failing++;
    printf("out_of_memory: %d allocations failed in turn, clean\n", failing - 1);
    return failing > 15 ? 0 : 1;
}
