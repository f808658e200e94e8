/* Split and merge: trees made from the pieces that hang off verified paths (merkle.md 4.2, 7). */
#include "merkle_parts.h"

#include <string.h>

static void add_made(jbm_tree *tree, const made_node *node)
{
    tree->adds[tree->add_count++] = (delta_item){node->prefix, node->hash, node->node, node->size, node->nbits};
}

/* Write the delta from the paths removed so far to the nodes made. */
static jbm_status write_made(jbm_tree *tree, jbm_buffer *delta)
{
    tree->add_count = 0;
    for (size_t i = 0; i < tree->made_count; i++)
        add_made(tree, &tree->made[i]);
    items_sort(tree->adds, tree->add_count);
    items_sort(tree->removes, tree->remove_count);
    delta_normalise(tree->adds, &tree->add_count, tree->removes, &tree->remove_count);
    return delta_write(delta, tree->adds, tree->add_count, tree->removes, tree->remove_count);
}

jbm_status jbm_tree_split(jbm_tree *tree, const uint8_t *proof, size_t proof_size, uint8_t *roots,
                          uint8_t *left_end, jbm_buffer *delta)
{
    uint8_t bounds[2][JBM_BOUNDS_BYTES], new_roots[2][JBM_HASH_BYTES];
    subtree *side[2] = {tree->hanging, tree->hanging + HANGING_MAX}; /* upper is filled from a copy */
    size_t count, counts[2] = {0, 0};
    uint8_t *end = bounds[0] + JBM_KEY_BYTES;
    const path_view *path = &tree->paths[0];
    jbm_status status = tree_parse_refresh(tree, proof, proof_size);

    if (status != JBM_OK)
        return status;
    if (memcmp(path->key, tree->bounds, JBM_KEY_BYTES) == 0)
        return JBM_INVALID_PROOF;
    memcpy(bounds[0], tree->bounds, JBM_KEY_BYTES);
    memcpy(end, path->key, JBM_KEY_BYTES);
    for (size_t i = JBM_KEY_BYTES; i-- > 0 && end[i]-- == 0;)
        continue; /* the key is above the start, so there is a key before it */
    memcpy(bounds[1], path->key, JBM_KEY_BYTES);
    memcpy(bounds[1] + JBM_KEY_BYTES, tree->bounds + JBM_KEY_BYTES, JBM_KEY_BYTES);

    count = path_hanging(path, tree->hanging);
    for (size_t i = 0; i < count; i++) {
        subtree branch = tree->hanging[i];
        bool lower = bits_compare(branch.prefix, branch.nbits, path->key, branch.nbits) < 0;

        side[lower ? 0 : 1][counts[lower ? 0 : 1]++] = branch;
    }
    tree->made_count = tree->remove_count = 0;
    for (size_t i = 0; i < 2; i++) {
        status = tree_assemble(bounds[i], side[i], counts[i], tree->spine, tree->made, &tree->made_count);
        if (status != JBM_OK)
            return status;
        memcpy(new_roots[i], tree->made[tree->made_count - 1].hash, JBM_HASH_BYTES);
    }
    tree_remove_path(tree, path);
    status = write_made(tree, delta);
    if (status != JBM_OK)
        return status;
    memcpy(roots, new_roots, sizeof new_roots);
    memcpy(left_end, end, JBM_KEY_BYTES);
    return JBM_OK;
}

/* Is `path` the outermost one on `side` (section 4.2)? */
static bool is_edge(const path_view *path, unsigned side)
{
    node_view root;

    step_node(&path->steps[0], &root);
    for (size_t i = 0; i < path->count; i++) {
        if (bit_at(path->key, path->steps[i].pos) != side && (i > 0 || root.side[side].nbits != 0))
            return false;
    }
    return path->leaf_hash != NULL || (root.side[0].nbits == 0 && root.side[1].nbits == 0);
}

/* Is `next` the key right after `end`? */
static bool follows(const uint8_t *end, const uint8_t *next)
{
    uint8_t after[JBM_KEY_BYTES];
    size_t i = JBM_KEY_BYTES;

    memcpy(after, end, sizeof after);
    while (i > 0 && ++after[i - 1] == 0)
        i--;
    return i > 0 && memcmp(after, next, sizeof after) == 0;
}

/* Verify both proofs (paths 0 and 1) and check that they are the edges at which the ranges touch. */
static jbm_status verify_edges(jbm_tree *tree, const uint8_t *other_root, const uint8_t *other_bounds,
                               bool *own_lower)
{
    const proof_view *own = &tree->proofs[0], *other = &tree->proofs[1];
    jbm_status status = tree_refresh(tree, own);

    if (status != JBM_OK)
        return status;
    if (memcmp(other->root, other_root, JBM_HASH_BYTES) != 0 ||
        memcmp(other->bounds, other_bounds, JBM_BOUNDS_BYTES) != 0)
        return JBM_INVALID_PROOF;
    tree->paths[1].steps = tree->steps[1];
    status = proof_verify(other, &tree->paths[1]);
    if (status != JBM_OK)
        return status;
    *own_lower = follows(tree->bounds + JBM_KEY_BYTES, other_bounds);
    if (!*own_lower && !follows(other_bounds + JBM_KEY_BYTES, tree->bounds))
        return JBM_NOT_ADJACENT;
    if (!is_edge(&tree->paths[1], *own_lower ? 0 : 1))
        return JBM_INVALID_PROOF;
    if (!is_edge(&tree->paths[0], *own_lower ? 1 : 0))
        return memcmp(own->root, tree->overlay.latest, JBM_HASH_BYTES) != 0 ? JBM_STALE_PROOF : JBM_INVALID_PROOF;
    return JBM_OK;
}

jbm_status jbm_tree_merge(jbm_tree *tree, const uint8_t *own, size_t own_size, const uint8_t *other,
                          size_t other_size, const uint8_t *other_root, size_t root_size,
                          const uint8_t *other_bounds, size_t bounds_size, uint8_t *root, uint8_t *bounds,
                          jbm_buffer *delta)
{
    uint8_t joined[JBM_BOUNDS_BYTES];
    jbm_status status;
    bool own_lower;
    size_t count;

    if (root_size != JBM_HASH_BYTES || bounds_size != JBM_BOUNDS_BYTES || !bounds_ordered(other_bounds))
        return JBM_BAD_ENCODING;
    if (proof_parse(own, own_size, &tree->proofs[0]) != JBM_OK)
        return JBM_BAD_ENCODING;
    if (proof_parse(other, other_size, &tree->proofs[1]) != JBM_OK)
        return JBM_BAD_ENCODING;
    status = verify_edges(tree, other_root, other_bounds, &own_lower);
    if (status != JBM_OK)
        return status;
    memcpy(joined, own_lower ? tree->bounds : other_bounds, JBM_KEY_BYTES);
    memcpy(joined + JBM_KEY_BYTES, (own_lower ? other_bounds : tree->bounds) + JBM_KEY_BYTES, JBM_KEY_BYTES);

    count = path_hanging(&tree->paths[0], tree->hanging);
    count += path_hanging(&tree->paths[1], tree->hanging + count);
    tree->made_count = tree->remove_count = 0;
    status = tree_assemble(joined, tree->hanging, count, tree->spine, tree->made, &tree->made_count);
    if (status != JBM_OK)
        return status;
    tree_remove_path(tree, &tree->paths[0]);
    tree_remove_path(tree, &tree->paths[1]);
    status = write_made(tree, delta);
    if (status != JBM_OK)
        return status;
    memcpy(root, tree->made[tree->made_count - 1].hash, JBM_HASH_BYTES);
    memcpy(bounds, joined, JBM_BOUNDS_BYTES);
    return JBM_OK;
}
