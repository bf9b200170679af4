/* The few functions of a C library that litmus, or the compiler on its behalf, calls. */
#include "litmus.h"

void *memset(void *to, int byte, size_t n)
{
    void *cursor = to;
    asm volatile("rep stosb" : "+D"(cursor), "+c"(n) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t n)
{
    void *cursor = to;
    asm volatile("rep movsb" : "+D"(cursor), "+S"(from), "+c"(n) : : "memory");
    return to;
}

size_t strlen(const char *s)
{
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}

bool streq(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

bool starts_with(const char *s, const char *prefix)
{
    while (*prefix)
        if (*s++ != *prefix++)
            return false;
    return true;
}

/* The digits of n, without an end mark; at most 20 of them. Returns how many. */
size_t put_number(char *to, uint64_t n, unsigned base)
{
    char digits[20];
    size_t count = 0;
    do
        digits[count++] = "0123456789abcdef"[n % base];
    while (n /= base);
    for (size_t i = 0; i < count; i++)
        to[i] = digits[count - 1 - i];
    return count;
}

uint64_t parse_number(const char *s, const char *end)
{
    uint64_t n = 0;
    for (; s < end && *s >= '0' && *s <= '9'; s++)
        n = n * 10 + (*s - '0');
    return n;
}

/* A number, decimal or with 0x, that K, M, G or T may follow. */
bool parse_size(const char *s, uint64_t *size)
{
    const bool hex = starts_with(s, "0x");
    uint64_t n = 0;
    const char *digits = s += hex ? 2 : 0;
    for (;; s++)
        if (*s >= '0' && *s <= '9')
            n = n * (hex ? 16 : 10) + (*s - '0');
        else if (hex && *s >= 'a' && *s <= 'f')
            n = n * 16 + (*s - 'a' + 10);
        else
            break;
    if (s == digits)
        return false;
    static const char units[] = "KMGT";
    for (unsigned i = 0; *s && units[i]; i++)
        if (*s == units[i]) {
            n <<= 10 * (i + 1);
            s++;
            break;
        }
    *size = n;
    return !*s;
}
