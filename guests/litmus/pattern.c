/*
 * The pattern: every page that is nobody's holds, 512 times, the same word: counter << 40 | pfn.
 *
 * The pfn tells a page that was put in the wrong place; the counter tells one that was sent too early and not again.
 * Pages are rewritten in order, round after round, so the counter a page must have follows from two numbers, and a
 * stale page cannot vouch for itself. A page of one repeated word compresses to almost nothing, which keeps saved
 * vectors small.
 */
#include "litmus.h"

#define WORDS (PAGE_SIZE / sizeof(uint64_t))
#define WORST 4                               /* so many bad pages are told one by one */

static struct range ranges[MAX_RANGES];
static unsigned nr_ranges;
static uint64_t total;
static uint64_t counter = 1;                  /* pages from the cursor on have this one, those before it the next */
static uint64_t cursor;

static uint64_t word_of(uint64_t pfn, uint64_t count)
{
    return count << 40 | pfn;
}

static void fill(uint64_t pfn, uint64_t count)
{
    uint64_t *page = page_address(pfn);
    for (unsigned i = 0; i < WORDS; i++)
        page[i] = word_of(pfn, count);
}

static uint64_t page_number(uint64_t n)
{
    unsigned r = 0;
    for (; n >= ranges[r].end - ranges[r].first; r++)
        n -= ranges[r].end - ranges[r].first;
    return ranges[r].first + n;
}

uint64_t pattern_pages(void)
{
    return total;
}

void pattern_fill(void)
{
    nr_ranges = free_ranges(ranges);
    for (unsigned r = 0; r < nr_ranges; r++)
        total += ranges[r].end - ranges[r].first;
    for (uint64_t n = 0; n < total; n++)
        fill(page_number(n), counter);
}

void pattern_dirty(uint64_t pages)
{
    while (pages--) {
        fill(page_number(cursor), counter + 1);
        if (++cursor == total) {
            cursor = 0;
            counter++;
        }
    }
}

static bool page_is_good(uint64_t pfn, uint64_t count, bool tell)
{
    const volatile uint64_t *page = page_address(pfn);
    uint64_t want = word_of(pfn, count);
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t got = page[i];
        if (got == want)
            continue;
        if (tell)
            print("pattern BAD pfn=0x%lx word=%lu want=0x%lx got=0x%lx", pfn, (uint64_t)i, want, got);
        return false;
    }
    return true;
}

bool pattern_check(void)
{
    uint64_t bad = 0;
    for (uint64_t n = 0; n < total; n++)
        if (!page_is_good(page_number(n), counter + (n < cursor), bad < WORST))
            bad++;
    if (bad)
        print("pattern BAD pages=%lu of=%lu counter=%lu", bad, total, counter);
    else
        print("pattern ok pages=%lu counter=%lu", total, counter);
    return !bad;
}
