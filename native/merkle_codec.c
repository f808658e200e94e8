/* Nodes: decoding, hashing, row keys (merkle.md 2, 3.1, 3.4). */
#include "merkle_parts.h"

#include <stdlib.h>
#include <string.h>

#include "blake3.h"

enum { VERSION = 0x01, KIND_LEAF = 0x10, KIND_INTERIOR = 0x20, FLAGS = 0x03 };

static const uint8_t ABSENT[2 + JBM_HASH_BYTES] = {0}; /* B(absent): no bits, zero hash */

void jbm_buffer_free(jbm_buffer *buffer)
{
    free(buffer->data);
    buffer->data = NULL;
    buffer->size = buffer->capacity = 0;
}

jbm_status buffer_reserve(jbm_buffer *buffer, size_t size)
{
    if (size > buffer->capacity) {
        uint8_t *data = realloc(buffer->data, size);

        if (data == NULL)
            return JBM_NO_MEMORY;
        buffer->data = data;
        buffer->capacity = size;
    }
    return JBM_OK;
}

/* Decode the branch of `side` at `*at`, moving `*at` behind it. */
static jbm_status branch_parse(const uint8_t *data, size_t size, size_t *at, unsigned side, branch_view *branch)
{
    size_t left = size - *at, nbits, prefix_size;

    if (left < 2)
        return JBM_BAD_ENCODING;
    nbits = (size_t)data[*at] << 8 | data[*at + 1];
    if (nbits == 0 || nbits > KEY_BITS)
        return JBM_BAD_ENCODING;
    prefix_size = bytes_for(nbits);
    if (left - 2 < prefix_size + JBM_HASH_BYTES)
        return JBM_BAD_ENCODING;
    branch->nbits = (uint16_t)nbits;
    branch->bits = data + *at + 2;
    branch->hash = branch->bits + prefix_size;
    if (!bits_padded(branch->bits, nbits) || bit_at(branch->bits, 0) != side)
        return JBM_BAD_ENCODING;
    *at += 2 + prefix_size + JBM_HASH_BYTES;
    return JBM_OK;
}

jbm_status node_parse(const uint8_t *data, size_t size, node_view *node)
{
    size_t at = 2;

    if (size < 2 || size > LEAF_HEADER + JBM_VALUE_MAX || data[0] != VERSION)
        return JBM_BAD_ENCODING;
    node->data = data;
    node->size = (uint32_t)size;
    node->is_leaf = data[1] == KIND_LEAF;
    node->value = NULL;
    node->value_size = 0;
    node->side[0].nbits = node->side[1].nbits = 0;
    if (node->is_leaf) {
        if (size < LEAF_HEADER || size - LEAF_HEADER != ((size_t)data[2] << 8 | data[3]))
            return JBM_BAD_ENCODING;
        node->value = data + LEAF_HEADER;
        node->value_size = (uint32_t)(size - LEAF_HEADER);
        return JBM_OK;
    }
    if ((data[1] & ~FLAGS) != KIND_INTERIOR)
        return JBM_BAD_ENCODING;
    for (unsigned side = 0; side < 2; side++) {
        jbm_status status;

        if ((data[1] & 1u << side) == 0)
            continue;
        status = branch_parse(data, size, &at, side, &node->side[side]);
        if (status != JBM_OK)
            return status;
    }
    return at == size ? JBM_OK : JBM_BAD_ENCODING;
}

void hash_leaf(const uint8_t *key, const uint8_t *value, size_t value_size, uint8_t *hash)
{
    uint8_t head[4 + JBM_KEY_BYTES + 8] = "leaf";
    blake3_state state;

    memcpy(head + 4, key, JBM_KEY_BYTES);
    for (size_t i = 0; i < 8; i++)
        head[4 + JBM_KEY_BYTES + i] = (uint8_t)((uint64_t)value_size >> (56 - 8 * i));
    blake3_start(&state);
    blake3_update(&state, head, sizeof head);
    blake3_update(&state, value, value_size);
    blake3_finish(&state, hash);
}

/* B(branch) of the hash is exactly the branch's encoding, so it is copied, not rebuilt. */
void hash_interior(const node_view *node, const uint8_t *bounds, uint8_t *hash)
{
    uint8_t message[4 + JBM_BOUNDS_BYTES + 2 + 2 * BRANCH_MAX];
    size_t at, lengths;

    if (bounds != NULL) {
        memcpy(message, "root", 4);
        memcpy(message + 4, bounds, JBM_BOUNDS_BYTES);
        at = 4 + JBM_BOUNDS_BYTES;
    } else {
        memcpy(message, "interior", 8);
        at = 8;
    }
    lengths = at;
    at += 2;
    for (size_t side = 0; side < 2; side++) {
        const branch_view *branch = &node->side[side];
        size_t size = branch->nbits == 0 ? sizeof ABSENT : 2 + bytes_for(branch->nbits) + JBM_HASH_BYTES;

        memcpy(message + at, branch->nbits == 0 ? ABSENT : branch->bits - 2, size);
        message[lengths + side] = (uint8_t)size;
        at += size;
    }
    blake3_short(message, at, hash);
}

size_t branch_write(uint8_t *to, const uint8_t *bits, size_t at, size_t nbits, const uint8_t *hash)
{
    to[0] = (uint8_t)(nbits >> 8);
    to[1] = (uint8_t)nbits;
    bits_extract(to + 2, bits, at, nbits);
    memcpy(to + 2 + bytes_for(nbits), hash, JBM_HASH_BYTES);
    return 2 + bytes_for(nbits) + JBM_HASH_BYTES;
}

bool bounds_ordered(const uint8_t *bounds)
{
    return memcmp(bounds, bounds + JBM_KEY_BYTES, JBM_KEY_BYTES) <= 0;
}

jbm_status jbm_check_node(const uint8_t *node, size_t node_size)
{
    node_view view;

    return node_parse(node, node_size, &view);
}

jbm_status jbm_node_hash(const uint8_t *node, size_t node_size, const uint8_t *key, size_t key_size,
                         const uint8_t *bounds, size_t bounds_size, uint8_t *hash)
{
    node_view view;
    jbm_status status = node_parse(node, node_size, &view);

    if (status != JBM_OK)
        return status;
    if (view.is_leaf) {
        if (key_size != JBM_KEY_BYTES)
            return JBM_BAD_ENCODING;
        hash_leaf(key, view.value, view.value_size, hash);
        return JBM_OK;
    }
    if (bounds_size == 0) {
        if (view.side[0].nbits == 0 || view.side[1].nbits == 0)
            return JBM_BAD_ENCODING;
        hash_interior(&view, NULL, hash);
        return JBM_OK;
    }
    if (bounds_size != JBM_BOUNDS_BYTES || !bounds_ordered(bounds))
        return JBM_BAD_ENCODING;
    hash_interior(&view, bounds, hash);
    return JBM_OK;
}

jbm_status jbm_empty_root(const uint8_t *bounds, size_t bounds_size, uint8_t *root, jbm_buffer *delta)
{
    static const uint8_t EMPTY[2] = {VERSION, KIND_INTERIOR};
    uint8_t hash[JBM_HASH_BYTES];
    delta_item item = {.prefix = EMPTY, .hash = hash, .node = EMPTY, .node_size = sizeof EMPTY, .nbits = 0};
    node_view view;
    jbm_status status = node_parse(EMPTY, sizeof EMPTY, &view);

    if (status != JBM_OK || bounds_size != JBM_BOUNDS_BYTES || !bounds_ordered(bounds))
        return JBM_BAD_ENCODING;
    hash_interior(&view, bounds, hash);
    status = delta_write(delta, &item, 1, NULL, 0);
    if (status == JBM_OK)
        memcpy(root, hash, JBM_HASH_BYTES);
    return status;
}

jbm_status jbm_row_key(const uint8_t *prefix, size_t prefix_size, size_t nbits, const uint8_t *hash,
                       size_t hash_size, uint8_t *row, size_t *row_size)
{
    size_t size;

    if (nbits > KEY_BITS || prefix_size != bytes_for(nbits) || hash_size != JBM_HASH_BYTES)
        return JBM_BAD_ENCODING;
    if (!bits_padded(prefix, nbits))
        return JBM_BAD_ENCODING;
    size = bits_base128(row, prefix, nbits);
    memcpy(row + size, hash, JBM_HASH_BYTES);
    *row_size = size + JBM_HASH_BYTES;
    return JBM_OK;
}

jbm_status jbm_path_scan_starts(const uint8_t *key, size_t key_size, size_t first, jbm_buffer *starts)
{
    jbm_status status;

    if (key_size != JBM_KEY_BYTES || first > KEY_BITS)
        return JBM_BAD_ENCODING;
    status = buffer_reserve(starts, (KEY_BITS + 1 - first) * (JBM_ROW_KEY_MAX - JBM_HASH_BYTES));
    if (status != JBM_OK)
        return status;
    starts->size = 0;
    for (size_t nbits = first; nbits <= KEY_BITS; nbits++)
        starts->size += bits_base128(starts->data + starts->size, key, nbits);
    return JBM_OK;
}
