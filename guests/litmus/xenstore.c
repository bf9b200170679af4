/* A xenstore client: one request at a time over the ring, and watch events kept as a flag, since there is one watch. */
#include "hypercall.h"
#include "litmus.h"

#define WAIT_NS (100 * NS_PER_MS)

static struct store_ring *ring;
static bool watch_fired;

void xenstore_connect(void)
{
    ring = page_address(mfn_to_pfn(start_info->store_mfn));
    event_listen(SLOT_STORE, start_info->store_evtchn);
}

static void wait(void)
{
    wait_until(now() + WAIT_NS);
    event_take(start_info->store_evtchn);
}

static void send(const void *data, size_t n)
{
    const char *bytes = data;
    for (size_t i = 0; i < n; i++) {
        while (ring->req_prod - ring->req_cons == sizeof(ring->req))
            wait();
        ring->req[ring->req_prod % sizeof(ring->req)] = bytes[i];
        __sync_synchronize();
        ring->req_prod++;
    }
}

/* The next n bytes from the daemon; those that do not fit into `size` are dropped. */
static void receive(void *data, size_t size, size_t n)
{
    char *bytes = data;
    for (size_t i = 0; i < n; i++) {
        while (ring->rsp_prod == ring->rsp_cons)
            wait();
        __sync_synchronize();
        if (i < size)
            bytes[i] = ring->rsp[ring->rsp_cons % sizeof(ring->rsp)];
        __sync_synchronize();
        ring->rsp_cons++;
    }
    event_send(start_info->store_evtchn);
}

/* One message; true if it answers a request. */
static bool receive_message(struct store_header *header, char *body, size_t size)
{
    receive(header, sizeof(*header), sizeof(*header));
    receive(body, size, header->len);
    if (header->type != XS_WATCH_EVENT)
        return true;
    watch_fired = true;
    return false;
}

/* first and second go out as they are, one after the other. The answer's body is left in `answer`, ended with a 0. */
static bool request(uint32_t type, const char *first, size_t first_size, const char *second, size_t second_size,
                    char *answer, size_t answer_size)
{
    struct store_header header = { .type = type, .len = first_size + second_size };
    send(&header, sizeof(header));
    send(first, first_size);
    send(second, second_size);
    event_send(start_info->store_evtchn);
    while (!receive_message(&header, answer, answer_size - 1))
        ;
    answer[MIN(header.len, answer_size - 1)] = 0;
    return header.type == type;
}

bool xenstore_read(const char *path, char *value, size_t size)
{
    return request(XS_READ, path, strlen(path) + 1, "", 0, value, size);
}

bool xenstore_write(const char *path, const char *value)
{
    char answer[32];
    return request(XS_WRITE, path, strlen(path) + 1, value, strlen(value), answer, sizeof(answer));
}

bool xenstore_watch(const char *path)
{
    char answer[32];
    /* A domain that was resumed the slow way believes itself a new one, but still has its watch. */
    return request(XS_WATCH, path, strlen(path) + 1, path, strlen(path) + 1, answer, sizeof(answer)) ||
           streq(answer, "EEXIST");
}

/* Whether the watched node may have changed since this was last asked. */
bool xenstore_take_watch_event(void)
{
    struct store_header header;
    char body[32];
    event_take(start_info->store_evtchn);
    while (ring->rsp_prod != ring->rsp_cons)
        receive_message(&header, body, sizeof(body));
    bool fired = watch_fired;
    watch_fired = false;
    return fired;
}
