#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kl {

#if defined(KL_X86)
namespace v4 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v2 {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif

namespace {

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
#if defined(KL_X86)
    __builtin_cpu_init();
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) found.push_back(&v4::kernels);
    if (v3) found.push_back(&v3::kernels);
    if (v2) found.push_back(&v2::kernels);
#else
    found.push_back(&baseline::kernels);
#endif
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

const std::vector<const Kernels*>& supported_kernels() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

const Kernels& kernels() {
    static const Kernels* const chosen = choose();
    if (chosen == nullptr)
        throw std::runtime_error("this processor lacks x86-64-v2, which the kernels need at least");
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
