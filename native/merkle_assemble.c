/* Assembling a tree from disjoint subtrees, for split and merge (merkle.md 7). */
#include "merkle_parts.h"

#include <string.h>

size_t path_hanging(const path_view *path, subtree *found)
{
    size_t count = 0;

    for (size_t i = 0; i < path->count; i++) {
        const path_step *step = &path->steps[i];
        node_view node;

        step_node(step, &node);
        for (unsigned side = 0; side < 2; side++) {
            const branch_view *branch = &node.side[side];
            bool taken = i + 1 < path->count && side == bit_at(path->key, step->pos);
            subtree *out;

            if (branch->nbits == 0 || taken)
                continue;
            out = &found[count++];
            memset(out->prefix, 0, sizeof out->prefix);
            bits_append(out->prefix, 0, path->key, step->pos);
            bits_append(out->prefix, step->pos, branch->bits, branch->nbits);
            out->nbits = (uint16_t)(step->pos + branch->nbits);
            memcpy(out->hash, branch->hash, JBM_HASH_BYTES);
        }
    }
    return count;
}

static jbm_status sort_disjoint(subtree *branches, size_t count)
{
    for (size_t i = 1; i < count; i++) {
        subtree branch = branches[i];
        size_t at = i;

        while (at > 0 && bits_compare(branches[at - 1].prefix, branches[at - 1].nbits, branch.prefix, branch.nbits) > 0) {
            branches[at] = branches[at - 1];
            at--;
        }
        branches[at] = branch;
    }
    for (size_t i = 1; i < count; i++) {
        const subtree *low = &branches[i - 1], *high = &branches[i];

        if (low->nbits <= high->nbits && bits_common(low->prefix, 0, high->prefix, low->nbits) == low->nbits)
            return JBM_INVALID_PROOF;
    }
    return JBM_OK;
}

/* Append the interior node (or root) at depth `depth` over the given children. */
static const made_node *make_node(made_node *node, size_t depth, const subtree *left, const subtree *right,
                                  const uint8_t *bounds)
{
    const subtree *children[2] = {left, right};
    node_view view;
    size_t size = 2;

    node->node[0] = 0x01;
    node->node[1] = 0x20;
    for (unsigned side = 0; side < 2; side++) {
        const subtree *child = children[side];

        if (child == NULL)
            continue;
        node->node[1] = (uint8_t)(node->node[1] | 1u << side);
        size += branch_write(node->node + size, child->prefix, depth, child->nbits - depth, child->hash);
    }
    node->size = (uint16_t)size;
    node->nbits = (uint16_t)depth;
    memset(node->prefix, 0, sizeof node->prefix);
    if (depth > 0)
        bits_append(node->prefix, 0, left->prefix, depth);
    (void)node_parse(node->node, size, &view);
    hash_interior(&view, bounds, node->hash);
    return node;
}

/* Close every fork deeper than `depth`: `current` becomes its right side, and the new node the current. */
static size_t close_forks(open_fork *spine, size_t open, size_t depth, subtree *current, made_node *made,
                          size_t *made_count)
{
    while (open > 0 && spine[open - 1].depth > depth) {
        const open_fork *fork = &spine[--open];
        const made_node *node = make_node(&made[(*made_count)++], fork->depth, &fork->left, current, NULL);

        memcpy(current->prefix, node->prefix, sizeof current->prefix);
        memcpy(current->hash, node->hash, sizeof current->hash);
        current->nbits = node->nbits;
    }
    return open;
}

/* The branches come in order, so the tree grows along its right spine: neighbours fork where they first differ,
 * and every deeper fork is complete by then. Depths on the spine ascend, hence at most 256 forks are open. */
jbm_status tree_assemble(const uint8_t *bounds, subtree *branches, size_t count, open_fork *spine,
                         made_node *made, size_t *made_count)
{
    jbm_status status = sort_disjoint(branches, count);
    const subtree *left = NULL, *right = NULL;
    subtree current;
    size_t open = 0;

    if (status != JBM_OK)
        return status;
    if (count > 0) {
        current = branches[0];
        for (size_t i = 1; i < count; i++) {
            const subtree *low = &branches[i - 1], *high = &branches[i];
            size_t both = low->nbits < high->nbits ? low->nbits : high->nbits;
            size_t depth = bits_common(low->prefix, 0, high->prefix, both);

            open = close_forks(spine, open, depth, &current, made, made_count);
            spine[open].left = current;
            spine[open].depth = (uint16_t)depth;
            open++;
            current = *high;
        }
        open = close_forks(spine, open, 0, &current, made, made_count);
        if (open > 0)
            left = &spine[0].left;
        if (bit_at(current.prefix, 0) == 0)
            left = &current;
        else
            right = &current;
    }
    (void)make_node(&made[(*made_count)++], 0, left, right, bounds);
    return JBM_OK;
}
