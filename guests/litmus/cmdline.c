/*
 * The command line says what litmus is to be, so that one kernel serves every test. A word that is not understood is
 * reported, not ignored.
 */
#include "litmus.h"

struct options options = {
    .p2m_form = FORM_LINEAR | FORM_TREE,
    .suspend = SUSPEND_EVTCHN,
    .heartbeat_ms = 1000,
    .vcpus = MAX_VCPUS,
    .levels = 4,
    .places = 64,
    .vaddr = P2M_BASE,
};

static const struct choice { const char *name; unsigned value; }
forms[] = { { "linear", FORM_LINEAR }, { "tree", FORM_TREE }, { "both", FORM_LINEAR | FORM_TREE },
            { "none", FORM_NONE }, { "invalid", FORM_INVALID }, { "tree4hidden", FORM_HIDDEN },
            { "marked", FORM_MARKED }, { "rooted", FORM_ROOTED }, { NULL, 0 } },
bads[] = { { "twice", BAD_TWICE }, { "foreign", BAD_FOREIGN }, { "stale", BAD_STALE }, { "oddgen", BAD_ODDGEN },
           { NULL, 0 } },
modes[] = { { "evtchn", SUSPEND_EVTCHN }, { "xenstore", SUSPEND_XENSTORE }, { "refuse", SUSPEND_REFUSE }, { NULL, 0 } };

const char *p2m_form_name(void)
{
    const struct choice *c = forms;
    while (c->value != options.p2m_form)
        c++;
    return c->name;
}

static bool choose(const struct choice *c, const char *word, unsigned *value)
{
    for (; c->name; c++)
        if (streq(c->name, word)) {
            *value = c->value;
            return true;
        }
    return false;
}

static bool parse_pages(const char *text, uint64_t *pages)
{
    uint64_t size;
    if (!parse_size(text, &size) || size % PAGE_SIZE || size > 32ul << 40)
        return false;
    *pages = size >> PAGE_SHIFT;
    return true;
}

/* An address, or how far behind the default. */
static bool parse_vaddr(const char *text)
{
    bool relative = *text == '+';
    uint64_t address;
    if (!parse_size(text + relative, &address))
        return false;
    if (relative)
        address += P2M_BASE;
    if (address % PAGE_SIZE || address < P2M_BASE || address >= P2M_LIMIT)
        return false;
    options.vaddr = address;
    return true;
}

static bool parse_word(const char *word)
{
    static const struct { const char *name; uint64_t *value, least, most; } numbers[] = {
        { "heartbeat=", &options.heartbeat_ms, 1, 3600000 },
        { "check=", &options.check_ms, 1, 3600000 },
        { "dirty=", &options.dirty, 0, 1ul << 32 },
        { "vcpus=", &options.vcpus, 1, MAX_VCPUS },
        { "levels=", &options.levels, 2, 6 },
        { "places=", &options.places, 1, MAX_PLACES },
    };
    for (unsigned i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        if (starts_with(word, numbers[i].name)) {
            const char *digits = word + strlen(numbers[i].name);
            const char *end = digits;
            while (*end >= '0' && *end <= '9')
                end++;
            uint64_t n = parse_number(digits, end);
            if (*end || end == digits || n < numbers[i].least || n > numbers[i].most)
                return false;
            *numbers[i].value = n;
            return true;
        }
    if (starts_with(word, "p2m="))
        return choose(forms, word + 4, &options.p2m_form);
    if (starts_with(word, "spread="))
        return parse_pages(word + 7, &options.spread);
    if (starts_with(word, "use="))
        return parse_pages(word + 4, &options.use);
    if (starts_with(word, "vaddr="))
        return parse_vaddr(word + 6);
    if (streq(word, "print=p2m"))
        return options.print_p2m = true;
    unsigned mode;
    if (starts_with(word, "suspend=") && choose(modes, word + 8, &mode)) {
        options.suspend = mode;
        return true;
    }
    if (starts_with(word, "bad=") && choose(bads, word + 4, &mode)) {
        options.bad = mode;
        return true;
    }
    return false;
}

void cmdline_parse(const char *line)
{
    while (*line) {
        char word[64];
        size_t n = 0;
        for (; *line && *line != ' '; line++)
            if (n < sizeof(word) - 1)
                word[n++] = *line;
        word[n] = 0;
        if (n && !parse_word(word))
            print("option %s not understood", word);
        while (*line == ' ')
            line++;
    }
}
