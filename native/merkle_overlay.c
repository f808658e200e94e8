/* The overlay: the nodes of recent deltas by hash, and the roots before them (merkle.md 5). */
#include "merkle_parts.h"

#include <stdlib.h>
#include <string.h>

enum { BUCKETS_FIRST = 64 };

static size_t bucket_of(const entry_table *table, const uint8_t *hash)
{
    uint64_t start;

    memcpy(&start, hash, sizeof start); /* a BLAKE3 hash is as good as a hash gets */
    return (size_t)start & table->mask;
}

static jbm_status table_start(entry_table *table)
{
    table->buckets = calloc(BUCKETS_FIRST, sizeof *table->buckets);
    table->mask = BUCKETS_FIRST - 1;
    table->count = 0;
    return table->buckets != NULL ? JBM_OK : JBM_NO_MEMORY;
}

static entry *table_find(const entry_table *table, const uint8_t *hash)
{
    entry *e = table->buckets[bucket_of(table, hash)];

    while (e != NULL && memcmp(e->hash, hash, JBM_HASH_BYTES) != 0)
        e = e->next;
    return e;
}

/* Double the buckets when they are outnumbered. Without memory chains get longer, nothing else. */
static void table_grow(entry_table *table)
{
    entry_table wider = {.mask = 2 * table->mask + 1, .count = table->count};

    if (table->count <= table->mask)
        return;
    wider.buckets = calloc(wider.mask + 1, sizeof *wider.buckets);
    if (wider.buckets == NULL)
        return;
    for (size_t i = 0; i <= table->mask; i++) {
        entry *next;

        for (entry *e = table->buckets[i]; e != NULL; e = next) {
            size_t at = bucket_of(&wider, e->hash);

            next = e->next;
            e->next = wider.buckets[at];
            wider.buckets[at] = e;
        }
    }
    free(table->buckets);
    *table = wider;
}

static void table_link(entry_table *table, entry *e)
{
    size_t at;

    table_grow(table);
    at = bucket_of(table, e->hash);
    e->next = table->buckets[at];
    table->buckets[at] = e;
    table->count++;
}

static void table_unlink(entry_table *table, const entry *e)
{
    entry **link = &table->buckets[bucket_of(table, e->hash)];

    while (*link != e)
        link = &(*link)->next;
    *link = e->next;
    table->count--;
}

jbm_status overlay_start(overlay *o, const uint8_t *root, size_t capacity)
{
    memset(o, 0, sizeof *o);
    memcpy(o->latest, root, JBM_HASH_BYTES);
    o->capacity = capacity;
    o->ring = calloc(capacity, sizeof *o->ring);
    if (o->ring == NULL || table_start(&o->nodes) != JBM_OK || table_start(&o->roots) != JBM_OK) {
        overlay_end(o);
        return JBM_NO_MEMORY;
    }
    return JBM_OK;
}

void overlay_end(overlay *o)
{
    for (size_t i = 0; i < o->used; i++)
        free(o->ring[(o->first + i) % o->capacity]);
    free(o->ring);
    free(o->nodes.buckets);
    free(o->roots.buckets);
    memset(o, 0, sizeof *o);
}

bool overlay_knows(const overlay *o, const uint8_t *root)
{
    return memcmp(o->latest, root, JBM_HASH_BYTES) == 0 || table_find(&o->roots, root) != NULL;
}

const entry *overlay_node(const overlay *o, const uint8_t *hash)
{
    return table_find(&o->nodes, hash);
}

const uint8_t *overlay_root(const overlay *o, size_t n)
{
    return o->ring[(o->first + n) % o->capacity]->root_before.hash;
}

static void drop_oldest(overlay *o)
{
    change *oldest = o->ring[o->first];

    for (size_t i = 0; i < oldest->count; i++)
        table_unlink(&o->nodes, &oldest->added[i]);
    table_unlink(&o->roots, &oldest->root_before);
    free(oldest);
    o->first = (o->first + 1) % o->capacity;
    o->used--;
}

/* Copy the latest root and the added nodes into one block; nothing is linked yet. */
static change *change_new(const overlay *o, const delta_item *adds, size_t count)
{
    size_t size = sizeof(change) + count * sizeof(entry);
    change *made;
    uint8_t *to;

    for (size_t i = 0; i < count; i++)
        size += adds[i].node_size;
    made = malloc(size);
    if (made == NULL)
        return NULL;
    memset(&made->root_before, 0, sizeof made->root_before);
    memcpy(made->root_before.hash, o->latest, JBM_HASH_BYTES);
    made->count = count;
    to = (uint8_t *)(made->added + count);
    for (size_t i = 0; i < count; i++) {
        entry *e = &made->added[i];

        e->next = NULL;
        e->node = to;
        e->size = adds[i].node_size;
        memcpy(e->hash, adds[i].hash, JBM_HASH_BYTES);
        memcpy(to, adds[i].node, adds[i].node_size);
        to += adds[i].node_size;
    }
    return made;
}

jbm_status overlay_push(overlay *o, const uint8_t *root, const delta_item *adds, size_t count)
{
    change *made = change_new(o, adds, count);

    if (made == NULL)
        return JBM_NO_MEMORY;
    if (o->used == o->capacity) /* from here on nothing fails */
        drop_oldest(o);
    for (size_t i = 0; i < count; i++)
        table_link(&o->nodes, &made->added[i]);
    table_link(&o->roots, &made->root_before);
    o->ring[(o->first + o->used) % o->capacity] = made;
    o->used++;
    memcpy(o->latest, root, JBM_HASH_BYTES);
    return JBM_OK;
}
