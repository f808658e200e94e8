/* The tree: refresh and insert (merkle.md 5, 6). */
#include "merkle_parts.h"

#include <stdlib.h>
#include <string.h>

struct jbm_path {
    path_view view;
    uint8_t key[JBM_KEY_BYTES];
    uint8_t root[JBM_HASH_BYTES];
    uint8_t leaf_hash[JBM_HASH_BYTES];
    path_step steps[]; /* followed by the nodes, their hashes and the value */
};

jbm_status jbm_tree_new(const uint8_t *root, size_t root_size, const uint8_t *bounds, size_t bounds_size,
                        size_t capacity, jbm_tree **tree)
{
    jbm_tree *made;

    if (root_size != JBM_HASH_BYTES || bounds_size != JBM_BOUNDS_BYTES || !bounds_ordered(bounds))
        return JBM_BAD_ENCODING;
    if (capacity == 0 || capacity > JBM_CAPACITY_MAX)
        return JBM_BAD_ENCODING;
    made = malloc(sizeof *made);
    if (made == NULL)
        return JBM_NO_MEMORY;
    memcpy(made->bounds, bounds, JBM_BOUNDS_BYTES);
    if (overlay_start(&made->overlay, root, capacity) != JBM_OK) {
        free(made);
        return JBM_NO_MEMORY;
    }
    *tree = made;
    return JBM_OK;
}

void jbm_tree_free(jbm_tree *tree)
{
    if (tree != NULL)
        overlay_end(&tree->overlay);
    free(tree);
}

jbm_status jbm_tree_root(const jbm_tree *tree, uint8_t *root)
{
    memcpy(root, tree->overlay.latest, JBM_HASH_BYTES);
    return JBM_OK;
}

jbm_status jbm_tree_valid_roots(const jbm_tree *tree, jbm_buffer *roots)
{
    const overlay *o = &tree->overlay;
    jbm_status status = buffer_reserve(roots, (o->used + 1) * JBM_HASH_BYTES);

    if (status != JBM_OK)
        return status;
    memcpy(roots->data, o->latest, JBM_HASH_BYTES);
    roots->size = JBM_HASH_BYTES;
    for (size_t i = 0; i < o->used; i++) {
        memcpy(roots->data + roots->size, overlay_root(o, i), JBM_HASH_BYTES);
        roots->size += JBM_HASH_BYTES;
    }
    return JBM_OK;
}

/* ---- refresh (section 5) ---- */

/* The verified node of `path` at `pos` with this hash, or NULL. Positions ascend, and so does `*next`. */
static const path_step *proof_node(const path_view *path, size_t *next, size_t pos, const uint8_t *hash)
{
    while (*next < path->count && path->steps[*next].pos < pos)
        (*next)++;
    if (*next == path->count || path->steps[*next].pos != pos)
        return NULL;
    return memcmp(path->steps[*next].hash, hash, JBM_HASH_BYTES) == 0 ? &path->steps[*next] : NULL;
}

static jbm_status refresh_leaf(const jbm_tree *tree, const path_view *old, const uint8_t *want, path_view *path)
{
    const entry *e = overlay_node(&tree->overlay, want);
    node_view node;

    path->leaf_hash = want;
    if (e != NULL) {
        if (node_parse(e->node, e->size, &node) != JBM_OK || !node.is_leaf)
            return JBM_STALE_PROOF;
        path->value = node.value;
        path->value_size = node.value_size;
        return JBM_OK;
    }
    if (old->leaf_hash == NULL || memcmp(old->leaf_hash, want, JBM_HASH_BYTES) != 0)
        return JBM_STALE_PROOF;
    path->value = old->value;
    path->value_size = old->value_size;
    return JBM_OK;
}

/* Walk `old->key` from the latest root, each node from the overlay or from the verified older path. */
static jbm_status walk_latest(const jbm_tree *tree, const path_view *old, path_view *path)
{
    const uint8_t *want = tree->overlay.latest;
    size_t pos = 0, next = 0;

    path->key = old->key;
    path->root = tree->overlay.latest;
    path->count = 0;
    path->leaf_hash = path->value = NULL;
    path->value_size = 0;
    while (pos < KEY_BITS) {
        const entry *e = overlay_node(&tree->overlay, want);
        const path_step *step = e == NULL ? proof_node(old, &next, pos, want) : NULL;
        const branch_view *branch;
        node_view node;

        if (e == NULL && step == NULL)
            return JBM_STALE_PROOF;
        if (node_parse(e != NULL ? e->node : step->node, e != NULL ? e->size : step->size, &node) != JBM_OK)
            return JBM_STALE_PROOF;
        if (node.is_leaf || !node_fits(&node, pos))
            return JBM_STALE_PROOF;
        path->steps[path->count++] = (path_step){(uint16_t)pos, (uint16_t)node.size, want, node.data};
        branch = &node.side[bit_at(old->key, pos)];
        if (branch->nbits == 0 ||
            bits_common(old->key, pos, branch->bits, branch->nbits) != branch->nbits)
            return JBM_OK;
        pos += branch->nbits;
        want = branch->hash;
    }
    return refresh_leaf(tree, old, want, path);
}

jbm_status tree_refresh(jbm_tree *tree, const proof_view *proof)
{
    path_view old = {.steps = tree->steps[0]};
    jbm_status status;

    if (!overlay_knows(&tree->overlay, proof->root))
        return JBM_STALE_PROOF;
    if (memcmp(proof->bounds, tree->bounds, JBM_BOUNDS_BYTES) != 0)
        return JBM_INVALID_PROOF;
    status = proof_verify(proof, &old);
    if (status != JBM_OK)
        return status;
    if (memcmp(proof->root, tree->overlay.latest, JBM_HASH_BYTES) == 0) {
        tree->paths[0] = old;
        return JBM_OK;
    }
    tree->paths[0].steps = tree->steps[2];
    return walk_latest(tree, &old, &tree->paths[0]);
}

jbm_status tree_parse_refresh(jbm_tree *tree, const uint8_t *proof, size_t proof_size)
{
    jbm_status status = proof_parse(proof, proof_size, &tree->proofs[0]);

    return status == JBM_OK ? tree_refresh(tree, &tree->proofs[0]) : status;
}

/* Copy a path with everything it points at into one block of memory. */
static jbm_path *path_copy(const path_view *from)
{
    size_t size = sizeof(jbm_path) + from->count * sizeof(path_step) + from->value_size;
    jbm_path *path;
    uint8_t *to;

    for (size_t i = 0; i < from->count; i++)
        size += JBM_HASH_BYTES + (size_t)from->steps[i].size;
    path = malloc(size);
    if (path == NULL)
        return NULL;
    memcpy(path->key, from->key, JBM_KEY_BYTES);
    memcpy(path->root, from->root, JBM_HASH_BYTES);
    path->view = *from;
    path->view.key = path->key;
    path->view.root = path->root;
    path->view.steps = path->steps;
    to = (uint8_t *)(path->steps + from->count);
    for (size_t i = 0; i < from->count; i++) {
        const path_step *step = &from->steps[i];

        path->steps[i] = (path_step){step->pos, step->size, to, to + JBM_HASH_BYTES};
        memcpy(to, step->hash, JBM_HASH_BYTES);
        memcpy(to + JBM_HASH_BYTES, step->node, step->size);
        to += JBM_HASH_BYTES + step->size;
    }
    if (from->leaf_hash != NULL) {
        memcpy(path->leaf_hash, from->leaf_hash, JBM_HASH_BYTES);
        path->view.leaf_hash = path->leaf_hash;
        path->view.value = to;
        if (from->value_size > 0)
            memcpy(to, from->value, from->value_size);
    }
    return path;
}

jbm_status jbm_tree_latest(jbm_tree *tree, const uint8_t *proof, size_t proof_size, jbm_path **path)
{
    jbm_status status = tree_parse_refresh(tree, proof, proof_size);
    jbm_path *copy;

    if (status != JBM_OK)
        return status;
    copy = path_copy(&tree->paths[0]);
    if (copy == NULL)
        return JBM_NO_MEMORY;
    *path = copy;
    return JBM_OK;
}

void jbm_path_free(jbm_path *path)
{
    free(path);
}

const uint8_t *jbm_path_value(const jbm_path *path, size_t *size)
{
    if (path->view.leaf_hash == NULL)
        return NULL;
    *size = path->view.value_size;
    return path->view.value;
}

/* ---- insert (section 6) ---- */

void tree_remove_path(jbm_tree *tree, const path_view *path)
{
    for (size_t i = 0; i < path->count; i++)
        tree->removes[tree->remove_count++] =
            (delta_item){path->key, path->steps[i].hash, NULL, 0, path->steps[i].pos};
}

/* Write a new interior node at key[..pos] with branches `towards` the key and `away` (NULL: none). */
static made_node *made_interior(jbm_tree *tree, const uint8_t *key, size_t pos)
{
    made_node *node = &tree->made[tree->made_count++];

    memcpy(node->prefix, key, JBM_KEY_BYTES); /* readers look at the first nbits bits only */
    node->nbits = (uint16_t)pos;
    node->node[0] = 0x01;
    node->node[1] = 0x20;
    node->size = 2;
    return node;
}

static void made_branch(made_node *node, unsigned side, const uint8_t *bits, size_t at, size_t nbits,
                        const uint8_t *hash)
{
    node->node[1] = (uint8_t)(node->node[1] | 1u << side);
    node->size = (uint16_t)(node->size + branch_write(node->node + node->size, bits, at, nbits, hash));
}

static void made_hash(made_node *node, const uint8_t *bounds)
{
    node_view view;

    (void)node_parse(node->node, node->size, &view);
    hash_interior(&view, bounds, node->hash);
}

/* Rebuild `step` with its branch towards the key being `nbits` key bits to `child`. */
static const made_node *rebuild(jbm_tree *tree, const path_view *path, const path_step *step, size_t nbits,
                                const uint8_t *child)
{
    made_node *node = made_interior(tree, path->key, step->pos);
    unsigned towards = bit_at(path->key, step->pos);
    node_view old;

    step_node(step, &old);
    for (unsigned side = 0; side < 2; side++) {
        if (side == towards)
            made_branch(node, side, path->key, step->pos, nbits, child);
        else if (old.side[side].nbits != 0)
            made_branch(node, side, old.side[side].bits, 0, old.side[side].nbits, old.side[side].hash);
    }
    made_hash(node, step->pos == 0 ? tree->bounds : NULL);
    return node;
}

/* Make the nodes of the new path, deepest first; the list of adds is filled from its far end, root first. */
static const uint8_t *make_path(jbm_tree *tree, const path_view *path, const delta_item *leaf, delta_item **first)
{
    const path_step *last = &path->steps[path->count - 1];
    const uint8_t *child = leaf->hash;
    delta_item *at = tree->adds + ITEMS_MAX;
    const branch_view *branch;
    size_t tail = KEY_BITS - (size_t)last->pos;
    node_view node;

    *--at = *leaf;
    step_node(last, &node);
    branch = &node.side[bit_at(path->key, last->pos)];
    if (branch->nbits != 0 && path->leaf_hash == NULL) {
        size_t common = bits_common(path->key, last->pos, branch->bits, branch->nbits);
        size_t fork_pos = last->pos + common;
        made_node *fork = made_interior(tree, path->key, fork_pos);

        for (unsigned side = 0; side < 2; side++) {
            if (side == bit_at(path->key, fork_pos))
                made_branch(fork, side, path->key, fork_pos, KEY_BITS - fork_pos, child);
            else
                made_branch(fork, side, branch->bits, common, branch->nbits - common, branch->hash);
        }
        made_hash(fork, NULL);
        *--at = (delta_item){path->key, fork->hash, fork->node, fork->size, fork->nbits};
        child = fork->hash;
        tail = common;
    }
    for (size_t i = path->count; i-- > 0;) {
        const path_step *step = &path->steps[i];
        const made_node *made = rebuild(tree, path, step, tail, child);

        *--at = (delta_item){path->key, made->hash, made->node, made->size, made->nbits};
        child = made->hash;
        if (i > 0)
            tail = (size_t)(step->pos - path->steps[i - 1].pos);
    }
    *first = at;
    return child;
}

static jbm_status insert(jbm_tree *tree, const path_view *path, const uint8_t *value, size_t value_size,
                         uint8_t *root, jbm_buffer *delta)
{
    uint8_t leaf_hash[JBM_HASH_BYTES], new_root[JBM_HASH_BYTES];
    delta_item leaf = {path->key, leaf_hash, NULL, (uint32_t)(LEAF_HEADER + value_size), KEY_BITS};
    delta_item *first;
    uint8_t *encoded;
    jbm_status status;

    if (path->leaf_hash != NULL && path->value_size == value_size &&
        (value_size == 0 || memcmp(path->value, value, value_size) == 0)) {
        status = delta_write(delta, NULL, 0, NULL, 0);
        if (status == JBM_OK)
            memcpy(root, tree->overlay.latest, JBM_HASH_BYTES);
        return status;
    }
    encoded = malloc(LEAF_HEADER + value_size);
    if (encoded == NULL)
        return JBM_NO_MEMORY;
    encoded[0] = 0x01;
    encoded[1] = 0x10;
    encoded[2] = (uint8_t)(value_size >> 8);
    encoded[3] = (uint8_t)value_size;
    if (value_size > 0)
        memcpy(encoded + LEAF_HEADER, value, value_size);
    hash_leaf(path->key, value, value_size, leaf_hash);
    leaf.node = encoded;

    tree->made_count = tree->remove_count = 0;
    memcpy(new_root, make_path(tree, path, &leaf, &first), JBM_HASH_BYTES);
    tree->add_count = (size_t)(tree->adds + ITEMS_MAX - first);
    tree_remove_path(tree, path);
    if (path->leaf_hash != NULL)
        tree->removes[tree->remove_count++] = (delta_item){path->key, path->leaf_hash, NULL, 0, KEY_BITS};
    delta_normalise(first, &tree->add_count, tree->removes, &tree->remove_count);
    status = delta_write(delta, first, tree->add_count, tree->removes, tree->remove_count);
    if (status == JBM_OK)
        status = overlay_push(&tree->overlay, new_root, first, tree->add_count);
    free(encoded);
    if (status == JBM_OK)
        memcpy(root, new_root, JBM_HASH_BYTES);
    return status;
}

jbm_status jbm_tree_insert(jbm_tree *tree, const jbm_path *path, const uint8_t *value, size_t value_size,
                           uint8_t *root, jbm_buffer *delta)
{
    if (value_size > JBM_VALUE_MAX)
        return JBM_BAD_ENCODING;
    if (memcmp(path->root, tree->overlay.latest, JBM_HASH_BYTES) != 0)
        return JBM_STALE_PROOF;
    return insert(tree, &path->view, value, value_size, root, delta);
}

jbm_status jbm_tree_update(jbm_tree *tree, const uint8_t *proof, size_t proof_size, const uint8_t *value,
                           size_t value_size, uint8_t *root, jbm_buffer *delta)
{
    jbm_status status;

    if (value_size > JBM_VALUE_MAX)
        return JBM_BAD_ENCODING;
    status = tree_parse_refresh(tree, proof, proof_size);
    return status == JBM_OK ? insert(tree, &tree->paths[0], value, value_size, root, delta) : status;
}
