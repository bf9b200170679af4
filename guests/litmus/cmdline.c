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
};

static const struct choice { const char *name; unsigned value; }
forms[] = { { "linear", FORM_LINEAR }, { "tree", FORM_TREE }, { "both", FORM_LINEAR | FORM_TREE }, { NULL, 0 } },
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

static bool parse_word(const char *word)
{
    static const struct { const char *name; uint64_t *value, least, most; } numbers[] = {
        { "heartbeat=", &options.heartbeat_ms, 1, 3600000 },
        { "check=", &options.check_ms, 1, 3600000 },
        { "dirty=", &options.dirty, 0, 1ul << 32 },
        { "vcpus=", &options.vcpus, 1, MAX_VCPUS },
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
    unsigned mode;
    if (starts_with(word, "suspend=") && choose(modes, word + 8, &mode)) {
        options.suspend = mode;
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
