// A decoded kernel and its launch, as program.py hands them over, and what goes wrong in one.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

#include "values.h"

namespace ptx {

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffffu;

// How an atomic access orders those around it: bits of Instruction::width.
constexpr s32 RELEASE = 1;
constexpr s32 ACQUIRE = 2;

// A register is 32 lanes of 4 or 8 bytes; registers are named by their offset in bytes. Mirrored in
// program.py.
struct Instruction {
    s32 opcode, guard;              // guard: the predicate, -1 if none
    s32 negated, count;             // count: registers that a vector access moves
    s32 destination[4], source[4];  // -1: none
    s64 immediate;                  // a branch's target, an address's offset
    s32 line, width;                // width: bytes of one register of an access
};

struct Buffer {
    u64 begin, end;
    s32 writable, pad;
};

struct Launch {
    const Instruction* code;
    const u8* registers;  // a warp's registers at its start: constants and parameters
    s64 register_bytes;
    s32 tid, ctaid_x, ctaid_y, ctaid_z, nctaid_x, warps;  // registers of the special values; warps of a block
    s64 grid_x, grid_y, grid_z, shared_bytes;
    const Buffer* buffers;
    s64 n_buffers;
    s64 resident, quantum, patience;  // blocks at a time; instructions of a turn; of all without progress
    u64 seed;
    s32 shuffle, weak, error, hazards, races, pad;
    u64* executed;  // of each instruction: by warps, by lanes; or null
    u64* traffic;   // of each buffer: bytes loaded and stored, and how many different ones; or null
    char* message;
    s64 message_bytes;
};

struct Fault {
    std::string what;
};

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Fault{text};
}

}  // namespace ptx
