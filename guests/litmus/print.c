/*
 * What every other file of litmus may call, and which calls none of them: print, panic and shutdown.
 *
 * One line per event on the PV console, each starting "litmus: ", made to be read by programs. console.c says where lines
 * go. A line that cannot be written is dropped, and the next line that gets through is preceded by one that says how
 * many were lost.
 */
#include "hypercall.h"
#include "litmus.h"
#include <stdarg.h>

static print_sink *sink;
static volatile bool locked;
static uint64_t lost;

void print_to(print_sink *to)
{
    sink = to;
}

struct line { char text[256]; size_t n; };

static void add(struct line *line, char c)
{
    if (line->n < sizeof(line->text) - 1)
        line->text[line->n++] = c;
}

static void add_string(struct line *line, const char *s)
{
    while (*s)
        add(line, *s++);
}

static void add_number(struct line *line, uint64_t n, unsigned base)
{
    char digits[20];
    size_t count = put_number(digits, n, base);
    for (size_t i = 0; i < count; i++)
        add(line, digits[i]);
}

/* %s, %lu and %lx. */
static void format_line(struct line *line, const char *format, va_list args)
{
    add_string(line, "litmus: ");
    for (; *format; format++)
        if (*format != '%')
            add(line, *format);
        else if (format[1] == 's')
            add_string(line, va_arg(args, const char *)), format++;
        else
            add_number(line, va_arg(args, uint64_t), format[2] == 'x' ? 16 : 10), format += 2;
    add(line, '\n');
}

static void print_line(const char *format, va_list args)
{
    struct line line = { .n = 0 };
    format_line(&line, format, args);
    if (!sink(line.text, line.n))
        lost++;
}

static void print_lost(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    lost = 0;
    print_line(format, args);
    va_end(args);
}

void print(const char *format, ...)
{
    va_list args;
    if (!sink)
        return;
    /* A vcpu that died with the lock must not silence the one that reports it: the wait has an end. */
    for (unsigned tries = 0; __sync_lock_test_and_set(&locked, true) && tries < 100000; tries++)
        yield();
    if (lost)
        print_lost("lost lines=%lu", lost);
    va_start(args, format);
    print_line(format, args);
    va_end(args);
    __sync_lock_release(&locked);
}

void panic(const char *why)
{
    print("panic %s", why);
    shutdown(SHUTDOWN_CRASH);
}

void shutdown(unsigned reason)
{
    for (;;)
        sched_op(SCHEDOP_SHUTDOWN, &reason);
}
