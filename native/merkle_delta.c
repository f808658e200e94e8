/* Deltas: the codec, row keys of a whole delta, squashing (merkle.md 3.3, 3.4, 8). */
#include "merkle_parts.h"

#include <stdlib.h>
#include <string.h>

enum { DELTA_HEADER = 2, COUNT_BYTES = 4, VERSION = 0x01, KIND_DELTA = 0x50 };
enum { KEY_LEAST = 2 + JBM_HASH_BYTES }; /* bytes of a node key with an empty prefix */

int item_compare(const delta_item *a, const delta_item *b)
{
    int order = bits_compare(a->prefix, a->nbits, b->prefix, b->nbits);

    return order != 0 ? order : memcmp(a->hash, b->hash, JBM_HASH_BYTES);
}

/* Insertion sort: the lists are short (at most two paths) and nearly in order. */
void items_sort(delta_item *items, size_t count)
{
    for (size_t i = 1; i < count; i++) {
        delta_item item = items[i];
        size_t at = i;

        for (; at > 0 && item_compare(&items[at - 1], &item) > 0; at--)
            items[at] = items[at - 1];
        items[at] = item;
    }
}

static size_t items_unique(delta_item *items, size_t count)
{
    size_t kept = 0;

    for (size_t i = 0; i < count; i++) {
        if (kept == 0 || item_compare(&items[kept - 1], &items[i]) != 0)
            items[kept++] = items[i];
    }
    return kept;
}

void delta_normalise(delta_item *adds, size_t *add_count, delta_item *removes, size_t *remove_count)
{
    size_t add_end = items_unique(adds, *add_count), remove_end = items_unique(removes, *remove_count);
    size_t a = 0, r = 0, add_kept = 0, remove_kept = 0;

    while (a < add_end && r < remove_end) {
        int order = item_compare(&adds[a], &removes[r]);

        if (order < 0) {
            adds[add_kept++] = adds[a++];
        } else if (order > 0) {
            removes[remove_kept++] = removes[r++];
        } else {
            a++;
            r++;
        }
    }
    while (a < add_end)
        adds[add_kept++] = adds[a++];
    while (r < remove_end)
        removes[remove_kept++] = removes[r++];
    *add_count = add_kept;
    *remove_count = remove_kept;
}

static uint8_t *write32(uint8_t *to, size_t number)
{
    for (size_t i = 0; i < 4; i++)
        to[i] = (uint8_t)(number >> (24 - 8 * i));
    return to + 4;
}

static size_t read32(const uint8_t *from)
{
    return (size_t)from[0] << 24 | (size_t)from[1] << 16 | (size_t)from[2] << 8 | from[3];
}

jbm_status delta_write(jbm_buffer *out, const delta_item *adds, size_t add_count, const delta_item *removes,
                       size_t remove_count)
{
    size_t size = DELTA_HEADER + 2 * COUNT_BYTES;
    jbm_status status;
    uint8_t *to;

    if (add_count > UINT32_MAX || remove_count > UINT32_MAX)
        return JBM_BAD_ENCODING;
    for (size_t i = 0; i < add_count; i++)
        size += KEY_LEAST + bytes_for(adds[i].nbits) + 4 + adds[i].node_size;
    for (size_t i = 0; i < remove_count; i++)
        size += KEY_LEAST + bytes_for(removes[i].nbits);
    status = buffer_reserve(out, size);
    if (status != JBM_OK)
        return status;
    to = out->data;
    *to++ = VERSION;
    *to++ = KIND_DELTA;
    to = write32(to, add_count);
    for (size_t i = 0; i < add_count; i++) {
        to += branch_write(to, adds[i].prefix, 0, adds[i].nbits, adds[i].hash);
        to = write32(to, adds[i].node_size);
        memcpy(to, adds[i].node, adds[i].node_size);
        to += adds[i].node_size;
    }
    to = write32(to, remove_count);
    for (size_t i = 0; i < remove_count; i++)
        to += branch_write(to, removes[i].prefix, 0, removes[i].nbits, removes[i].hash);
    out->size = size;
    return JBM_OK;
}

/* A read position that checks what is left before every step. */
typedef struct {
    const uint8_t *at;
    size_t left;
} cursor;

static const uint8_t *take(cursor *c, size_t size)
{
    const uint8_t *from = c->at;

    if (c->left < size)
        return NULL;
    c->at += size;
    c->left -= size;
    return from;
}

static jbm_status take_count(cursor *c, size_t *count)
{
    const uint8_t *from = take(c, COUNT_BYTES);

    if (from == NULL)
        return JBM_BAD_ENCODING;
    *count = read32(from);
    return JBM_OK;
}

/* Decode one element: a node key, and for an add the node. `item->node` is NULL for a remove. */
static jbm_status take_item(cursor *c, bool is_add, delta_item *item)
{
    const uint8_t *from = take(c, 2);
    size_t nbits;

    if (from == NULL)
        return JBM_BAD_ENCODING;
    nbits = (size_t)from[0] << 8 | from[1];
    if (nbits > KEY_BITS)
        return JBM_BAD_ENCODING;
    item->nbits = (uint16_t)nbits;
    item->prefix = take(c, bytes_for(nbits));
    if (item->prefix == NULL || !bits_padded(item->prefix, nbits))
        return JBM_BAD_ENCODING;
    item->hash = take(c, JBM_HASH_BYTES);
    item->node = NULL;
    item->node_size = 0;
    if (item->hash == NULL)
        return JBM_BAD_ENCODING;
    if (is_add) {
        node_view view;
        size_t size;

        if (take_count(c, &size) != JBM_OK)
            return JBM_BAD_ENCODING;
        item->node = take(c, size);
        if (item->node == NULL)
            return JBM_BAD_ENCODING;
        item->node_size = (uint32_t)size;
        return node_parse(item->node, size, &view);
    }
    return JBM_OK;
}

static jbm_status take_list(cursor *c, bool is_add, size_t count)
{
    delta_item last = {0}, item;

    for (size_t i = 0; i < count; i++) {
        if (take_item(c, is_add, &item) != JBM_OK || (i > 0 && item_compare(&last, &item) >= 0))
            return JBM_BAD_ENCODING;
        last = item;
    }
    return JBM_OK;
}

/* A checked delta: where its lists start, for reading them again without any check failing. */
typedef struct {
    cursor adds, removes;
    size_t add_count, remove_count;
} delta_view;

/* Both lists ascend, so one walk over the two finds a key that is in both. */
static bool lists_disjoint(const delta_view *view)
{
    cursor adds = view->adds, removes = view->removes;
    delta_item add, remove;
    size_t a = 0, r = 0;

    if (view->add_count == 0 || view->remove_count == 0)
        return true;
    (void)take_item(&adds, true, &add);
    (void)take_item(&removes, false, &remove);
    for (;;) {
        int order = item_compare(&add, &remove);

        if (order == 0)
            return false;
        if (order < 0) {
            if (++a == view->add_count)
                return true;
            (void)take_item(&adds, true, &add);
        } else {
            if (++r == view->remove_count)
                return true;
            (void)take_item(&removes, false, &remove);
        }
    }
}

static jbm_status delta_parse(const uint8_t *data, size_t size, delta_view *view)
{
    cursor c = {data, size};
    const uint8_t *header = take(&c, DELTA_HEADER);

    if (size > UINT32_MAX || header == NULL || header[0] != VERSION || header[1] != KIND_DELTA)
        return JBM_BAD_ENCODING;
    if (take_count(&c, &view->add_count) != JBM_OK)
        return JBM_BAD_ENCODING;
    view->adds = c;
    if (take_list(&c, true, view->add_count) != JBM_OK)
        return JBM_BAD_ENCODING;
    if (take_count(&c, &view->remove_count) != JBM_OK)
        return JBM_BAD_ENCODING;
    view->removes = c;
    if (take_list(&c, false, view->remove_count) != JBM_OK || c.left != 0)
        return JBM_BAD_ENCODING;
    return lists_disjoint(view) ? JBM_OK : JBM_BAD_ENCODING;
}

static void put_native32(uint8_t *to, size_t number)
{
    uint32_t word = (uint32_t)number;

    memcpy(to, &word, sizeof word);
}

jbm_status jbm_delta_index(const uint8_t *delta, size_t delta_size, uint32_t *counts, jbm_buffer *index)
{
    delta_view view;
    delta_item item;
    uint8_t *to;
    jbm_status status = delta_parse(delta, delta_size, &view);

    if (status == JBM_OK)
        status = buffer_reserve(index, (view.add_count + view.remove_count) * 16);
    if (status != JBM_OK)
        return status;
    to = index->data;
    for (size_t i = 0; i < view.add_count + view.remove_count; i++, to += 16) {
        bool is_add = i < view.add_count;

        (void)take_item(is_add ? &view.adds : &view.removes, is_add, &item);
        put_native32(to, (size_t)(item.prefix - delta));
        put_native32(to + 4, item.nbits);
        put_native32(to + 8, is_add ? (size_t)(item.node - delta) : 0);
        put_native32(to + 12, item.node_size);
    }
    index->size = (view.add_count + view.remove_count) * 16;
    counts[0] = (uint32_t)view.add_count;
    counts[1] = (uint32_t)view.remove_count;
    return JBM_OK;
}

jbm_status jbm_delta_rows(const uint8_t *delta, size_t delta_size, uint32_t *counts, jbm_buffer *rows)
{
    delta_view view;
    delta_item item;
    size_t total, at, size;
    jbm_status status = delta_parse(delta, delta_size, &view);

    if (status != JBM_OK)
        return status;
    total = view.add_count + view.remove_count;
    status = buffer_reserve(rows, total * (12 + JBM_ROW_KEY_MAX));
    if (status != JBM_OK)
        return status;
    at = total * 12;
    for (size_t i = 0; i < total; i++) {
        bool is_add = i < view.add_count;

        (void)take_item(is_add ? &view.adds : &view.removes, is_add, &item);
        size = bits_base128(rows->data + at, item.prefix, item.nbits);
        memcpy(rows->data + at + size, item.hash, JBM_HASH_BYTES);
        size += JBM_HASH_BYTES;
        at += size;
        put_native32(rows->data + 12 * i, size);
        put_native32(rows->data + 12 * i + 4, is_add ? (size_t)(item.node - delta) : 0);
        put_native32(rows->data + 12 * i + 8, item.node_size);
    }
    rows->size = at;
    counts[0] = (uint32_t)view.add_count;
    counts[1] = (uint32_t)view.remove_count;
    return JBM_OK;
}

/* ---- squash ---- */

/* An element of some delta; `turn` is the delta's place in the sequence. */
typedef struct {
    delta_item item;
    size_t turn;
} timed_item;

static int timed_compare(const void *a, const void *b)
{
    const timed_item *x = a, *y = b;
    int order = item_compare(&x->item, &y->item);

    return order != 0 ? order : x->turn < y->turn ? -1 : x->turn > y->turn;
}

/* Fold what happened to one key, in turn: an add meets a remove and both vanish, or the later one stands. */
static size_t fold(const timed_item *items, size_t count, delta_item *result)
{
    bool standing = false, is_add = false;

    for (size_t i = 0; i < count; i++) {
        bool adds = items[i].item.node != NULL;

        if (standing && is_add != adds) {
            standing = false;
        } else {
            standing = true;
            is_add = adds;
            *result = items[i].item;
        }
    }
    return standing ? 1 : 0;
}

/* Fold sorted elements into the two lists, which share the space of `adds` and `removes`. */
static void fold_all(const timed_item *items, size_t count, delta_item *adds, size_t *add_count,
                     delta_item *removes, size_t *remove_count)
{
    *add_count = *remove_count = 0;
    for (size_t start = 0; start < count;) {
        size_t end = start + 1;
        delta_item result;

        while (end < count && item_compare(&items[start].item, &items[end].item) == 0)
            end++;
        if (fold(items + start, end - start, &result) != 0) {
            if (result.node != NULL)
                adds[(*add_count)++] = result;
            else
                removes[(*remove_count)++] = result;
        }
        start = end;
    }
}

jbm_status jbm_squash(const uint8_t *const *deltas, const size_t *sizes, size_t count, jbm_buffer *delta)
{
    size_t total = 0, filled = 0, add_count, remove_count;
    timed_item *timed;
    delta_item *lists;
    delta_view view;
    jbm_status status;

    for (size_t i = 0; i < count; i++) {
        status = delta_parse(deltas[i], sizes[i], &view);
        if (status != JBM_OK)
            return status;
        total += view.add_count + view.remove_count;
    }
    if (total == 0)
        return delta_write(delta, NULL, 0, NULL, 0);
    timed = malloc(total * sizeof *timed);
    lists = malloc(2 * total * sizeof *lists);
    if (timed == NULL || lists == NULL) {
        free(timed);
        free(lists);
        return JBM_NO_MEMORY;
    }
    for (size_t i = 0; i < count; i++) {
        (void)delta_parse(deltas[i], sizes[i], &view);
        for (size_t k = 0; k < view.add_count + view.remove_count; k++, filled++) {
            bool is_add = k < view.add_count;

            (void)take_item(is_add ? &view.adds : &view.removes, is_add, &timed[filled].item);
            timed[filled].turn = i;
        }
    }
    qsort(timed, total, sizeof *timed, timed_compare);
    fold_all(timed, total, lists, &add_count, lists + total, &remove_count);
    status = delta_write(delta, lists, add_count, lists + total, remove_count);
    free(timed);
    free(lists);
    return status;
}
