#include "runtime/dispatch.h"

#if defined(KL_X86)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace kl {

// KL_ISAS is X(set) for every set that the kernels were compiled for, best first.
#define X(set)                    \
    namespace set {               \
    extern const Kernels kernels; \
    }
KL_ISAS
#undef X

namespace {

#if defined(KL_X86)
// Clang 14 has no name for it that __builtin_cpu_supports would take.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
#if defined(KL_X86)
    __builtin_cpu_init();
    [[maybe_unused]] const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    [[maybe_unused]] const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                     has_f16c() && __builtin_cpu_supports("bmi") &&
                                     __builtin_cpu_supports("bmi2");
    [[maybe_unused]] const bool v4 = v3 && __builtin_cpu_supports("avx512f") &&
                                     __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512cd") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    // Every processor of these architectures has the one set that is compiled for it.
    [[maybe_unused]] const bool neon = true, baseline = true;
#endif
#define X(set) \
    if (set) found.push_back(&set::kernels);
    KL_ISAS
#undef X
    return found;
}

// Best first.
const std::vector<const Kernels*>& supported_kernels() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

const Kernels* choose() {
    const auto& supported = supported_kernels();
    const char* wanted = std::getenv("KL_GPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return supported.empty() ? nullptr : supported.front();
    for (const Kernels* k : supported)
        if (std::string(wanted) == k->name) return k;
    throw std::runtime_error("KL_GPU_ISA=" + std::string(wanted) + ": expected one of " + supported_isas());
}

}  // namespace

const Kernels& kernels() {
    static const Kernels* const chosen = choose();
    if (chosen == nullptr)
        throw std::runtime_error(
            "this processor lacks every instruction set that the kernels were compiled for");
    return *chosen;
}

const char* isa() { return kernels().name; }

const char* supported_isas() {
    static const std::string names = [] {
        std::string s;
        for (const Kernels* k : supported_kernels()) s += (s.empty() ? "" : ", ") + std::string(k->name);
        return s;
    }();
    return names.c_str();
}

}  // namespace kl
