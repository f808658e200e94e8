/* The overlay: recent deltas by hash, with reference counts, and the roots before them (merkle.md 5). */
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

static void table_end(entry_table *table)
{
    for (size_t i = 0; table->buckets != NULL && i <= table->mask; i++) {
        entry *next;

        for (entry *e = table->buckets[i]; e != NULL; e = next) {
            next = e->next;
            free(e);
        }
    }
    free(table->buckets);
    table->buckets = NULL;
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

/* Drop one reference, and the entry with the last. */
static void table_release(entry_table *table, entry *e)
{
    entry **link = &table->buckets[bucket_of(table, e->hash)];

    if (--e->references > 0)
        return;
    while (*link != e)
        link = &(*link)->next;
    *link = e->next;
    table->count--;
    free(e);
}

/* Find the entry of `hash`, or make one with no reference that is not yet linked. */
static entry *entry_for(const entry_table *table, const uint8_t *hash, const uint8_t *node, size_t size)
{
    entry *e = table_find(table, hash);

    if (e != NULL)
        return e;
    e = malloc(sizeof *e + size);
    if (e == NULL)
        return NULL;
    e->next = NULL;
    e->references = 0;
    e->size = (uint32_t)size;
    memcpy(e->hash, hash, JBM_HASH_BYTES);
    if (size > 0)
        memcpy(e->node, node, size);
    return e;
}

static void entry_discard(entry *e)
{
    if (e != NULL && e->references == 0)
        free(e);
}

static void entry_keep(entry_table *table, entry *e)
{
    if (e->references++ == 0)
        table_link(table, e);
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
        free(o->ring[(o->first + i) % o->capacity].added);
    free(o->ring);
    o->ring = NULL;
    o->used = 0;
    table_end(&o->nodes);
    table_end(&o->roots);
}

bool overlay_knows(const overlay *o, const uint8_t *root)
{
    return memcmp(o->latest, root, JBM_HASH_BYTES) == 0 || table_find(&o->roots, root) != NULL;
}

const entry *overlay_node(const overlay *o, const uint8_t *hash)
{
    return table_find(&o->nodes, hash);
}

static void drop_oldest(overlay *o)
{
    change *oldest = &o->ring[o->first];

    for (size_t i = 0; i < oldest->count; i++)
        table_release(&o->nodes, oldest->added[i]);
    table_release(&o->roots, oldest->root_before);
    free(oldest->added);
    o->first = (o->first + 1) % o->capacity;
    o->used--;
}

jbm_status overlay_push(overlay *o, const uint8_t *root, const delta_item *adds, size_t count)
{
    change made = {.root_before = entry_for(&o->roots, o->latest, NULL, 0), .count = count};
    size_t ready = 0;

    made.added = malloc((count > 0 ? count : 1) * sizeof(entry *));
    if (made.root_before != NULL && made.added != NULL) {
        while (ready < count) {
            entry *e = entry_for(&o->nodes, adds[ready].hash, adds[ready].node, adds[ready].node_size);

            if (e == NULL)
                break;
            made.added[ready++] = e;
        }
    }
    if (made.root_before == NULL || made.added == NULL || ready < count) {
        for (size_t i = 0; i < ready; i++)
            entry_discard(made.added[i]);
        entry_discard(made.root_before);
        free(made.added);
        return JBM_NO_MEMORY;
    }
    /* From here on nothing fails. New references come before old ones go: a node may be in both changes. */
    for (size_t i = 0; i < count; i++)
        entry_keep(&o->nodes, made.added[i]);
    entry_keep(&o->roots, made.root_before);
    if (o->used == o->capacity)
        drop_oldest(o);
    o->ring[(o->first + o->used) % o->capacity] = made;
    o->used++;
    memcpy(o->latest, root, JBM_HASH_BYTES);
    return JBM_OK;
}
