/* Proofs: decoding and verification (merkle.md 3.2, 4.1). */
#include "merkle_parts.h"

#include <string.h>

enum { VERSION = 0x01, KIND_PROOF = 0x40 };
enum { PROOF_HEADER = 2 + JBM_KEY_BYTES + JBM_BOUNDS_BYTES + JBM_HASH_BYTES + 2 };

/* Decode `be32 size || node` at `*at`, moving `*at` behind it. */
static jbm_status nested_parse(const uint8_t *data, size_t size, size_t *at, bool is_leaf, node_view *node)
{
    size_t nested;

    if (size - *at < 4)
        return JBM_BAD_ENCODING;
    nested = (size_t)data[*at] << 24 | (size_t)data[*at + 1] << 16 | (size_t)data[*at + 2] << 8 | data[*at + 3];
    *at += 4;
    if (size - *at < nested || node_parse(data + *at, nested, node) != JBM_OK || node->is_leaf != is_leaf)
        return JBM_BAD_ENCODING;
    *at += nested;
    return JBM_OK;
}

jbm_status proof_parse(const uint8_t *data, size_t size, proof_view *proof)
{
    size_t at = PROOF_HEADER, count;

    if (size < PROOF_HEADER || data[0] != VERSION || data[1] != KIND_PROOF)
        return JBM_BAD_ENCODING;
    proof->key = data + 2;
    proof->bounds = proof->key + JBM_KEY_BYTES;
    proof->root = proof->bounds + JBM_BOUNDS_BYTES;
    count = (size_t)data[PROOF_HEADER - 2] << 8 | data[PROOF_HEADER - 1];
    if (count == 0 || count > PATH_MAX_NODES)
        return JBM_BAD_ENCODING;
    proof->count = (uint16_t)count;
    for (size_t i = 0; i < count; i++) {
        if (nested_parse(data, size, &at, false, &proof->nodes[i]) != JBM_OK)
            return JBM_BAD_ENCODING;
    }
    if (size - at < 1 || data[at] > 1)
        return JBM_BAD_ENCODING;
    proof->has_leaf = data[at++] == 1;
    if (proof->has_leaf && nested_parse(data, size, &at, true, &proof->leaf) != JBM_OK)
        return JBM_BAD_ENCODING;
    return at == size ? JBM_OK : JBM_BAD_ENCODING;
}

void step_node(const path_step *step, node_view *node)
{
    (void)node_parse(step->node, step->size, node);
}

bool node_fits(const node_view *node, size_t pos)
{
    for (size_t side = 0; side < 2; side++) {
        size_t nbits = node->side[side].nbits;

        if ((nbits == 0 && pos > 0) || pos + nbits > KEY_BITS)
            return false;
    }
    return true;
}

static bool last_fits(const proof_view *proof, const branch_view *branch, size_t pos, path_view *path)
{
    uint8_t hash[JBM_HASH_BYTES];
    bool matches = branch->nbits != 0 && bits_common(proof->key, pos, branch->bits, branch->nbits) == branch->nbits;

    path->leaf_hash = path->value = NULL;
    path->value_size = 0;
    if (!proof->has_leaf)
        return !matches;
    if (!matches || pos + branch->nbits != KEY_BITS)
        return false;
    hash_leaf(proof->key, proof->leaf.value, proof->leaf.value_size, hash);
    path->leaf_hash = branch->hash;
    path->value = proof->leaf.value;
    path->value_size = proof->leaf.value_size;
    return memcmp(hash, branch->hash, JBM_HASH_BYTES) == 0;
}

jbm_status proof_verify(const proof_view *proof, path_view *path)
{
    const uint8_t *want = proof->root;
    size_t pos = 0;

    if (!bounds_ordered(proof->bounds) || memcmp(proof->key, proof->bounds, JBM_KEY_BYTES) < 0 ||
        memcmp(proof->key, proof->bounds + JBM_KEY_BYTES, JBM_KEY_BYTES) > 0)
        return JBM_INVALID_PROOF;
    path->key = proof->key;
    path->root = proof->root;
    path->count = proof->count;
    for (size_t i = 0; i < proof->count; i++) {
        const node_view *node = &proof->nodes[i];
        const branch_view *branch;
        uint8_t hash[JBM_HASH_BYTES];

        if (pos >= KEY_BITS || !node_fits(node, pos))
            return JBM_INVALID_PROOF;
        hash_interior(node, i == 0 ? proof->bounds : NULL, hash);
        if (memcmp(hash, want, JBM_HASH_BYTES) != 0)
            return JBM_INVALID_PROOF;
        path->steps[i] = (path_step){(uint16_t)pos, (uint16_t)node->size, want, node->data};
        branch = &node->side[bit_at(proof->key, pos)];
        if (i + 1 == proof->count)
            return last_fits(proof, branch, pos, path) ? JBM_OK : JBM_INVALID_PROOF;
        if (branch->nbits == 0 || bits_common(proof->key, pos, branch->bits, branch->nbits) != branch->nbits)
            return JBM_INVALID_PROOF;
        pos += branch->nbits;
        want = branch->hash;
    }
    return JBM_INVALID_PROOF; /* an empty path; the decoder admits none */
}
