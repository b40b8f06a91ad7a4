// Ends the program with one line where the processor lacks a feature that the build uses, before the first instruction
// that needs it. This file is compiled for the oldest processor of its kind and runs before all static initialisers,
// those of libraries too. So it calls no inline function and no template: the linker could take another file's copy.
#include "processor.h"
#include <string.h>
#include <unistd.h>

static const char* const names[] = {
#define F(name, macro) name,
    PROCESSOR_FEATURES(F)
#undef F
    nullptr};

static unsigned long long processor_has() {
    unsigned long long has = 0, bit = 1;
    (void)bit;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define F(name, macro) has |= __builtin_cpu_supports(name) ? bit : 0; bit <<= 1;
    PROCESSOR_FEATURES(F)
#undef F
#endif
    return has;
}

static void append(char* line, unsigned long size, unsigned long* length, const char* text) {
    unsigned long n = strlen(text), room = size - *length;
    if (n > room) n = room;
    memcpy(line + *length, text, n);
    *length += n;
}

unsigned long processor_report(unsigned long long needs, unsigned long long has, char* line, unsigned long size) {
    unsigned long length = 0;
    if ((needs & ~has) == 0) return 0;
    append(line, size, &length, "olmoe: this processor lacks what the program was built to use:");
    for (int i = 0; names[i]; i++) {
        if (!((needs & ~has) >> i & 1)) continue;
        append(line, size, &length, " ");
        append(line, size, &length, names[i]);
    }
    append(line, size, &length, ". Build it again here: make (or elsewhere, for this processor: make MARCH=...)\n");
    return length;
}

static void check_processor() {
    char line[1024];
    unsigned long length = processor_report(processor_needs, processor_has(), line, sizeof line);
    if (length == 0) return;
    ssize_t written = write(2, line, length);
    (void)written;                                      // there is nowhere else to report it
    _exit(1);
}
__attribute__((section(".preinit_array"), used)) static void (*const before_initialisers)() = check_processor;
