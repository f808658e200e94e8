/* The one declaration list of the Merkle kernel: included by the C, read verbatim by cffi.
 *
 * Rules of every function: (pointer, size) pairs only; sizes are checked before a byte is read or allocated;
 * the result is a status, and out-parameters are written only when it is JBM_OK. Encodings are those of
 * merkle.md 3. `bounds` is 64 bytes: the first and the last key of a range. A tree is used by one caller at a
 * time; a call that does not return JBM_OK leaves it as it was. */

enum { JBM_HASH_BYTES = 32 };
enum { JBM_KEY_BYTES = 32 };
enum { JBM_BOUNDS_BYTES = 64 };
enum { JBM_VALUE_MAX = 65535 };
enum { JBM_CAPACITY_MAX = 65535 };
enum { JBM_ROW_KEY_MAX = 70 };

typedef enum {
    JBM_OK = 0,
    JBM_BAD_ENCODING = 1,
    JBM_INVALID_PROOF = 2,
    JBM_STALE_PROOF = 3,
    JBM_NOT_ADJACENT = 4,
    JBM_NO_MEMORY = 5
} jbm_status;

typedef struct jbm_tree jbm_tree; /* latest root and overlay of one tree */
typedef struct jbm_path jbm_path; /* a refreshed proof: the latest path of one key, on its own memory */

/* Growing output memory owned by the caller: start with all zero, reuse freely, free once. */
typedef struct {
    uint8_t *data;
    size_t size;
    size_t capacity;
} jbm_buffer;

void jbm_buffer_free(jbm_buffer *buffer);

/* Nodes, row keys (merkle.md 2, 3.1, 3.4). `bounds_size` is 64 for a root, 0 otherwise; `hash` takes 32 bytes. */
jbm_status jbm_check_node(const uint8_t *node, size_t node_size);
jbm_status jbm_node_hash(const uint8_t *node, size_t node_size, const uint8_t *key, size_t key_size,
                         const uint8_t *bounds, size_t bounds_size, uint8_t *hash);
jbm_status jbm_empty_root(const uint8_t *bounds, size_t bounds_size, uint8_t *root, jbm_buffer *delta);
jbm_status jbm_row_key(const uint8_t *prefix, size_t prefix_size, size_t nbits, const uint8_t *hash,
                       size_t hash_size, uint8_t *row /* JBM_ROW_KEY_MAX */, size_t *row_size);
/* base128 of the first n key bits, n = first..256, one after the other; each is ceil(n / 7) + 1 bytes. */
jbm_status jbm_path_scan_starts(const uint8_t *key, size_t key_size, size_t first, jbm_buffer *starts);

/* Deltas (merkle.md 3.3, 8). `counts` takes the numbers of adds and removes. */
/* Index: uint32 quadruples (offset of the prefix, bits, offset of the node, node size), removes with 0, 0. */
jbm_status jbm_delta_index(const uint8_t *delta, size_t delta_size, uint32_t *counts, jbm_buffer *index);
/* Rows: uint32 triples (row key size, offset of the node, node size), then all row keys one after the other. */
jbm_status jbm_delta_rows(const uint8_t *delta, size_t delta_size, uint32_t *counts, jbm_buffer *rows);
jbm_status jbm_squash(const uint8_t *const *deltas, const size_t *sizes, size_t count, jbm_buffer *delta);

/* Trees (merkle.md 4 to 7). */
jbm_status jbm_tree_new(const uint8_t *root, size_t root_size, const uint8_t *bounds, size_t bounds_size,
                        size_t capacity, jbm_tree **tree);
void jbm_tree_free(jbm_tree *tree);
jbm_status jbm_tree_root(const jbm_tree *tree, uint8_t *root);
/* The latest root, then the one before each retained delta, oldest first; repetitions included. */
jbm_status jbm_tree_valid_roots(const jbm_tree *tree, jbm_buffer *roots);

jbm_status jbm_tree_latest(jbm_tree *tree, const uint8_t *proof, size_t proof_size, jbm_path **path);
void jbm_path_free(jbm_path *path);
const uint8_t *jbm_path_value(const jbm_path *path, size_t *size); /* NULL if there is no leaf */

jbm_status jbm_tree_insert(jbm_tree *tree, const jbm_path *path, const uint8_t *value, size_t value_size,
                           uint8_t *root, jbm_buffer *delta);
jbm_status jbm_tree_update(jbm_tree *tree, const uint8_t *proof, size_t proof_size, const uint8_t *value,
                           size_t value_size, uint8_t *root, jbm_buffer *delta);
/* `roots` takes 64 bytes: left, right. `left_end` takes the last key of the left half. */
jbm_status jbm_tree_split(jbm_tree *tree, const uint8_t *proof, size_t proof_size, uint8_t *roots,
                          uint8_t *left_end, jbm_buffer *delta);
jbm_status jbm_tree_merge(jbm_tree *tree, const uint8_t *own, size_t own_size, const uint8_t *other,
                          size_t other_size, const uint8_t *other_root, size_t root_size,
                          const uint8_t *other_bounds, size_t bounds_size, uint8_t *root, uint8_t *bounds,
                          jbm_buffer *delta);
