/* What the kernel's source files share: bit strings, decoded views, the overlay and the delta writer.
 *
 * Everything decoded is a view into somebody else's bytes and lives as long as they do. Nothing recurses, and
 * no loop runs longer than a length that was checked against the input or the 256 bits of a key. */
#ifndef JBM_MERKLE_PARTS_H
#define JBM_MERKLE_PARTS_H

#include <stdbool.h>

#include "merkle.h"

enum {
    KEY_BITS = 256,
    PATH_MAX_NODES = 256, /* every step consumes at least one key bit */
    BRANCH_MAX = 66,      /* be16 bits, 32 bytes of prefix, hash */
    INTERIOR_MAX = 134,   /* version, kind, two branches */
    LEAF_HEADER = 4,
    HANGING_MAX = PATH_MAX_NODES + 1, /* one per step, two at the last */
};

/* ---- bit strings (merkle_bits.c); bit 0 is the most significant bit of byte 0 ---- */

static inline unsigned bit_at(const uint8_t *bits, size_t pos)
{
    return (unsigned)(bits[pos >> 3] >> (7 - (pos & 7))) & 1u;
}

static inline size_t bytes_for(size_t nbits)
{
    return (nbits + 7) / 8;
}

/* Length of the common start of `a` from bit `from` on and `b` from its bit 0 on, at most `nbits`. The caller
 * guarantees that `a` has from + nbits and `b` nbits bits. */
size_t bits_common(const uint8_t *a, size_t from, const uint8_t *b, size_t nbits);
/* Order of bit strings, a proper prefix first: negative, zero or positive. */
int bits_compare(const uint8_t *a, size_t a_bits, const uint8_t *b, size_t b_bits);
/* Copy `nbits` bits of `from` starting at bit `at` to bit 0 of `to`, zeroing the padding of the last byte. */
void bits_extract(uint8_t *to, const uint8_t *from, size_t at, size_t nbits);
/* Set `nbits` bits of `to`, which are zero, starting at bit `at`, to those of `from`. */
void bits_append(uint8_t *to, size_t at, const uint8_t *from, size_t nbits);
/* Write base128 of a bit string, ceil(nbits / 7) + 1 bytes, and return its size. */
size_t bits_base128(uint8_t *to, const uint8_t *bits, size_t nbits);
bool bits_padded(const uint8_t *bits, size_t nbits); /* are the unused low bits zero? */

/* ---- nodes (merkle_codec.c) ---- */

typedef struct {
    uint16_t nbits; /* 0: there is no such branch */
    const uint8_t *bits;
    const uint8_t *hash;
} branch_view;

typedef struct {
    const uint8_t *data;
    uint32_t size;
    bool is_leaf;
    const uint8_t *value; /* of a leaf */
    uint32_t value_size;
    branch_view side[2]; /* of an interior node */
} node_view;

jbm_status node_parse(const uint8_t *data, size_t size, node_view *node);
void hash_leaf(const uint8_t *key, const uint8_t *value, size_t value_size, uint8_t *hash);
void hash_interior(const node_view *node, const uint8_t *bounds /* NULL unless a root */, uint8_t *hash);
/* Append one branch to an encoding: `nbits` bits of `bits` from bit `at` on; return its size. */
size_t branch_write(uint8_t *to, const uint8_t *bits, size_t at, size_t nbits, const uint8_t *hash);
bool bounds_ordered(const uint8_t *bounds);

/* ---- proofs (merkle_proof.c) ---- */

typedef struct {
    const uint8_t *key, *bounds, *root;
    uint16_t count;
    bool has_leaf;
    node_view leaf;
    node_view nodes[PATH_MAX_NODES];
} proof_view;

jbm_status proof_parse(const uint8_t *data, size_t size, proof_view *proof);

typedef struct {
    uint16_t pos;
    uint16_t size;
    const uint8_t *hash;
    const uint8_t *node;
} path_step;

/* A verified path: interior nodes from the root towards `key`, and the leaf if there is one. */
typedef struct {
    const uint8_t *key, *root;
    uint16_t count;
    const uint8_t *leaf_hash; /* NULL: no leaf */
    const uint8_t *value;
    uint32_t value_size;
    path_step *steps;
} path_view;

/* Section 4.1, 2b: both branches but at a root, and none reaching beyond the key. */
bool node_fits(const node_view *node, size_t pos);
jbm_status proof_verify(const proof_view *proof, path_view *path /* steps: room for PATH_MAX_NODES */);
/* Decode a node that was decoded before; it cannot fail. */
void step_node(const path_step *step, node_view *node);

/* ---- deltas (merkle_delta.c) ---- */

typedef struct {
    const uint8_t *prefix; /* at least ceil(nbits / 8) bytes; what follows the first nbits bits is ignored */
    const uint8_t *hash;
    const uint8_t *node;
    uint32_t node_size;
    uint16_t nbits;
} delta_item;

int item_compare(const delta_item *a, const delta_item *b);
void items_sort(delta_item *items, size_t count);
/* Drop duplicates and every key in both lists; both ascending (merkle.md 8). */
void delta_normalise(delta_item *adds, size_t *add_count, delta_item *removes, size_t *remove_count);
jbm_status delta_write(jbm_buffer *out, const delta_item *adds, size_t add_count, const delta_item *removes,
                       size_t remove_count);
jbm_status buffer_reserve(jbm_buffer *buffer, size_t size);

/* ---- the overlay (merkle_overlay.c) ---- */

/* An element of a chained table. The same hash may be in a table more than once, each entry owned by the change
 * that added it: a node stays known while any change that added it is retained, which is what counting references
 * would come to. */
typedef struct entry {
    struct entry *next;
    const uint8_t *node;
    uint8_t hash[JBM_HASH_BYTES];
    uint32_t size;
} entry;

typedef struct {
    entry **buckets;
    size_t mask;
    size_t count;
} entry_table;

/* One retained delta, a single block of memory: its entries are followed by the nodes they point to. */
typedef struct {
    entry root_before;
    size_t count;
    entry added[];
} change;

typedef struct {
    uint8_t latest[JBM_HASH_BYTES];
    entry_table nodes; /* added by the retained changes */
    entry_table roots; /* before each retained change */
    change **ring;
    size_t capacity, first, used;
} overlay;

jbm_status overlay_start(overlay *o, const uint8_t *root, size_t capacity);
void overlay_end(overlay *o);
bool overlay_knows(const overlay *o, const uint8_t *root);
const entry *overlay_node(const overlay *o, const uint8_t *hash);
/* The root before the n-th retained change, n < o->used; values that return make repetitions. */
const uint8_t *overlay_root(const overlay *o, size_t n);
/* Retain a change to `root`; on failure nothing has changed. */
jbm_status overlay_push(overlay *o, const uint8_t *root, const delta_item *adds, size_t count);

/* ---- assembling (merkle_assemble.c) ---- */

/* A disjoint subtree: its full prefix (zero beyond nbits) and hash. */
typedef struct {
    uint8_t prefix[JBM_KEY_BYTES];
    uint8_t hash[JBM_HASH_BYTES];
    uint16_t nbits;
} subtree;

typedef struct {
    uint8_t prefix[JBM_KEY_BYTES];
    uint8_t hash[JBM_HASH_BYTES];
    uint16_t nbits;
    uint16_t size;
    uint8_t node[INTERIOR_MAX];
} made_node;

typedef struct {
    subtree left;
    uint16_t depth;
} open_fork;

/* Append the branches not taken to `found` (room for HANGING_MAX more) and return how many there were. */
size_t path_hanging(const path_view *path, subtree *found);
/* Build the tree over `branches`, sorting them; append its nodes, the root last, to `made` (room for count + 1). */
jbm_status tree_assemble(const uint8_t *bounds, subtree *branches, size_t count, open_fork *spine,
                         made_node *made, size_t *made_count);

/* ---- the tree (merkle.c); split and merge are in merkle_reshape.c ---- */

enum { MADE_MAX = 2 * (HANGING_MAX + 1), ITEMS_MAX = MADE_MAX + 2 };

struct jbm_tree {
    uint8_t bounds[JBM_BOUNDS_BYTES];
    overlay overlay;
    /* Working memory of one call, here so that calls neither allocate it nor need a deep stack. */
    proof_view proofs[2];
    path_view paths[2];
    path_step steps[3][PATH_MAX_NODES]; /* as verified: own, other; refreshed */
    subtree hanging[2 * HANGING_MAX];
    open_fork spine[PATH_MAX_NODES + 1];
    made_node made[MADE_MAX];
    size_t made_count;
    delta_item adds[ITEMS_MAX], removes[ITEMS_MAX];
    size_t add_count, remove_count;
};

/* Bring a decoded proof of this tree to the latest root: tree->paths[0]. */
jbm_status tree_refresh(jbm_tree *tree, const proof_view *proof);
jbm_status tree_parse_refresh(jbm_tree *tree, const uint8_t *proof, size_t proof_size);
/* Append the interior nodes of a path to the nodes removed. */
void tree_remove_path(jbm_tree *tree, const path_view *path);

#endif
