/*
 * The p2m, and the forms in which it is published to the toolstack.
 *
 * There is one list, pfn -> mfn; its pages are the leaves of every form:
 *   linear   the list is mapped at one address and shared_info says where (p2m_cr3, p2m_vaddr, p2m_generation);
 *   trees    tables of mfns above the list, of any depth; shared_info's frame_list_list, or p2m_root, names the top.
 * The list is in the frames that the domain builder made for it. Where memory is spread it is a new one, and sparse:
 * leaves, tables and page tables without a single pfn are shared "missing" ones.
 *
 * A restore writes the list anew. The tables of a tree hold mfns that only litmus knows of: it fills them again after
 * each resume.
 */
#include "litmus.h"

#define INVALID_MFN (~0ul)
#define PER_PAGE    512u
#define MAX_LEVELS  6u
#define MARK        (1ul << 61)
#define PRINT_MOST  2000                      /* lines: after a restore every page may be a run of its own */

/* A page of the tree: which one of its level it is, if those that are missing are counted too. */
struct node { uint64_t index, pfn; };

struct level {
    struct node *nodes;                       /* by index */
    uint64_t count;
    uint64_t missing;                         /* a page of this level below which nothing is mapped; 0: none yet */
};

static volatile uint64_t *list;
static uint64_t entries;
static struct level tree[MAX_LEVELS];         /* level 0 is the list */
static unsigned depth;
static struct range ranges[MAX_RANGES];
static struct { uint64_t list, tree; } cost;  /* pages */

uint64_t pfn_to_mfn(uint64_t pfn)
{
    return list[pfn];
}

uint64_t mfn_to_pfn(uint64_t mfn)
{
    return M2P[mfn];
}

void p2m_set(uint64_t pfn, uint64_t mfn)
{
    list[pfn] = mfn;
}

/* The builder's list, where it put it: enough to make page tables with. */
void p2m_init(void)
{
    list = (uint64_t *)start_info->mfn_list;
    entries = start_info->nr_pages;
}

static void nodes_allocate(struct level *level, uint64_t most)
{
    level->nodes = page_address(allocate_pages(DIV_ROUND_UP(most * sizeof(struct node), PAGE_SIZE)));
}

static void add_node(struct level *level, uint64_t index)
{
    if (!level->count || level->nodes[level->count - 1].index != index)
        level->nodes[level->count++] = (struct node){ index, allocate_pages(1) };
}

static void fill_page(uint64_t pfn, uint64_t value)
{
    uint64_t *page = page_address(pfn);
    for (unsigned i = 0; i < PER_PAGE; i++)
        page[i] = value;
}

/* The list gets an address of its own, whatever the builder's placement was, and its last page an end. */
static void list_keep(void)
{
    uint64_t count = DIV_ROUND_UP(entries, PER_PAGE);
    uint64_t first = start_info->nr_p2m_frames ? start_info->first_p2m_pfn : address_pfn((void *)list);
    uint64_t *mapped = (uint64_t *)options.vaddr;
    map_pages(options.vaddr, first, count);
    for (uint64_t i = entries; i < count * PER_PAGE; i++)
        mapped[i] = INVALID_MFN;
    list = mapped;
    nodes_allocate(&tree[0], count);
    for (uint64_t i = 0; i < count; i++)
        tree[0].nodes[i] = (struct node){ i, first + i };
    tree[0].count = count;
}

static void leaves_allocate(unsigned nr_ranges)
{
    uint64_t most = 0;
    for (unsigned r = 0; r < nr_ranges; r++)
        most += (ranges[r].end - 1) / PER_PAGE - ranges[r].first / PER_PAGE + 1;
    nodes_allocate(&tree[0], most);
    for (unsigned r = 0; r < nr_ranges; r++)
        for (uint64_t leaf = ranges[r].first / PER_PAGE; leaf <= (ranges[r].end - 1) / PER_PAGE; leaf++)
            add_node(&tree[0], leaf);
    tree[0].missing = allocate_pages(1);
}

/* A new list, in which the builder's frames come in their order, at the pfns that they are moved to. */
static void list_spread(void)
{
    const volatile uint64_t *old = list;
    volatile uint64_t *new = (uint64_t *)options.vaddr;
    entries = options.spread;
    if (entries * sizeof(*list) > P2M_LIMIT - options.vaddr)
        panic("no room for the list");
    unsigned nr_ranges = populated_ranges(ranges);
    leaves_allocate(nr_ranges);
    fill_page(tree[0].missing, INVALID_MFN);
    map_sparse_init(options.vaddr, options.vaddr + entries * sizeof(*list), tree[0].missing);
    for (uint64_t i = 0; i < tree[0].count; i++) {
        fill_page(tree[0].nodes[i].pfn, INVALID_MFN);
        map_sparse(options.vaddr + tree[0].nodes[i].index * PAGE_SIZE, tree[0].nodes[i].pfn);
    }
    uint64_t from = 0;
    for (unsigned r = 0; r < nr_ranges; r++)
        for (uint64_t pfn = ranges[r].first; pfn < ranges[r].end; pfn++) {
            new[pfn] = old[from++];
            if (r)
                set_pfn_of(new[pfn], pfn);
        }
    flush_updates();
    list = new;
    start_info->mfn_list = options.vaddr;
    cost.list = allocated_pages();
    for (unsigned r = 1; r < nr_ranges; r++)
        map_pages((uint64_t)page_address(ranges[r].first), ranges[r].first, ranges[r].end - ranges[r].first);
}

/* How many levels are told to others. */
static unsigned exposed(void)
{
    switch (options.p2m_form) {
    case FORM_MARKED: return 4;
    case FORM_ROOTED: return options.levels;
    default:          return 3;
    }
}

/* Three levels are exposed even if they do not hold it all, as Linux does: only the kernel knows of those above. */
static void tree_allocate(void)
{
    const unsigned least = options.p2m_form == FORM_HIDDEN ? 4 : exposed();
    for (depth = 1; depth < least || tree[depth - 1].count > 1; depth++) {
        struct level *below = &tree[depth - 1];
        if (!below->missing)
            below->missing = allocate_pages(1);
        nodes_allocate(&tree[depth], below->count);
        for (uint64_t i = 0; i < below->count; i++)
            add_node(&tree[depth], below->nodes[i].index / PER_PAGE);
    }
    if (depth > exposed() && options.p2m_form & (FORM_MARKED | FORM_ROOTED))
        panic("p2m too large for the tree");
}

static void tree_fill(void)
{
    for (unsigned l = 0; l + 1 < depth; l++)
        fill_page(tree[l].missing, l ? pfn_to_mfn(tree[l - 1].missing) : INVALID_MFN);
    for (unsigned l = 1; l < depth; l++) {
        const struct level *below = &tree[l - 1];
        const struct node *parent = tree[l].nodes;
        for (uint64_t i = 0; i < tree[l].count; i++)
            fill_page(parent[i].pfn, pfn_to_mfn(below->missing));
        for (uint64_t i = 0; i < below->count; i++) {
            while (parent->index != below->nodes[i].index / PER_PAGE)
                parent++;
            uint64_t *table = page_address(parent->pfn);
            table[below->nodes[i].index % PER_PAGE] = pfn_to_mfn(below->nodes[i].pfn);
        }
    }
}

void p2m_list_init(void)
{
    uint64_t before = allocated_pages();
    if (options.spread)
        list_spread();
    else
        list_keep();
    cost.list = MAX(cost.list, before) - before;
    before = allocated_pages();
    if (options.p2m_form & FORM_TREES)
        tree_allocate();
    cost.tree = allocated_pages() - before;
    p2m_rebuild();
}

void p2m_rebuild(void)
{
    if (options.p2m_form & FORM_TREES)
        tree_fill();
}

static uint64_t tree_anchor(void)
{
    return pfn_to_mfn(tree[exposed() - 1].nodes[0].pfn);
}

static uint64_t frame_list_list(void)
{
    switch (options.p2m_form & ~FORM_LINEAR) {
    case FORM_TREE:
    case FORM_HIDDEN: return tree_anchor();
    case FORM_MARKED: return tree_anchor() | MARK;
    case FORM_NONE:   return 0;
    default:          return INVALID_MFN;
    }
}

/* The anchors. Whoever reads takes the linear list if p2m_cr3 is not 0, so that is written last. */
void p2m_publish(void)
{
    bool linear = options.p2m_form & FORM_LINEAR, rooted = options.p2m_form & FORM_ROOTED;
    shared_info.p2m_cr3 = 0;
    shared_info.p2m_levels = 0;
    __sync_synchronize();
    shared_info.frame_list_list = frame_list_list();
    shared_info.max_pfn = entries;
    shared_info.p2m_generation = options.bad == BAD_ODDGEN;
    shared_info.p2m_vaddr = linear ? options.vaddr : 0;
    shared_info.p2m_root = rooted ? tree_anchor() : 0;
    __sync_synchronize();
    shared_info.p2m_levels = rooted ? options.levels : 0;
    shared_info.p2m_cr3 = linear ? kernel_cr3() : 0;
}

/* Consecutive pfns; their mfns go up or, as the toolstack gets them in a restore, down. */
struct run { uint64_t pfn, pages, mfn, step; };

static uint64_t runs;

static void print_run(const struct run *run)
{
    if (run->pages && ++runs <= PRINT_MOST)
        print("p2m pfn=0x%lx pages=%lu mfn=0x%lx%s", run->pfn, run->pages, run->mfn, run->step == ~0ul ? " down" : "");
}

static bool continues(struct run *run, uint64_t pfn, uint64_t mfn)
{
    if (!run->pages || pfn != run->pfn + run->pages)
        return false;
    if (run->pages == 1 && (mfn == run->mfn + 1 || mfn == run->mfn - 1))
        run->step = mfn - run->mfn;
    return run->step && mfn == run->mfn + run->pages * run->step;
}

/* All of the list that is not INVALID_MFN. */
static void print_list(void)
{
    unsigned nr_ranges = populated_ranges(ranges);
    uint64_t pages = 0;
    struct run run = { .pages = 0 };
    runs = 0;
    for (unsigned r = 0; r < nr_ranges; r++)
        for (uint64_t pfn = ranges[r].first; pfn < ranges[r].end; pfn++) {
            uint64_t mfn = pfn_to_mfn(pfn);
            if (mfn == INVALID_MFN)
                continue;
            pages++;
            if (continues(&run, pfn, mfn)) {
                run.pages++;
                continue;
            }
            print_run(&run);
            run = (struct run){ pfn, 1, mfn, 0 };
        }
    print_run(&run);
    print("p2m end pages=%lu runs=%lu printed=%lu", pages, runs, MIN(runs, PRINT_MOST));
}

void p2m_print(void)
{
    if (options.spread)
        print("spread max_pfn=0x%lx places=%lu vaddr=0x%lx leaves=%lu list=%lu tree=%lu", entries, options.places,
              options.vaddr, tree[0].count, cost.list, cost.tree);
    if (options.print_p2m)
        print_list();
}
