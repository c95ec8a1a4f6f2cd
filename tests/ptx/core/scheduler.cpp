// Runs a launch: some blocks at a time, a random warp of a random block for a random turn, all from one seed.
#include <random>

#include "interpreter.h"

namespace ptx {

class Scheduler {
public:
    explicit Scheduler(const Launch& launch)
        : launch(launch), random(launch.seed), memory(launch, random), interpreter(launch, memory) {
        g_error = Error(launch.error);
        g_salt = mixed(2 * launch.seed + 1);
        order.resize(size_t(launch.grid_x * launch.grid_y * launch.grid_z));
        for (size_t n = 0; n < order.size(); n++) order[n] = s64(n);
        if (launch.shuffle) std::shuffle(order.begin(), order.end(), random);
    }

    s64 run() {
        for (fill(); !blocks.empty();) {
            size_t const n = random() % blocks.size();
            Block& block = *blocks[n];
            u64 const before = interpreter.executed;
            interpreter.progress = false;
            turn(block);
            if (launch.weak && random() % 32 == 0) {
                block.stores.let_one_arrive(random);
                of_ended.let_one_arrive(random);
            }
            if (block.done()) {
                end(n);
                continue;
            }
            bool const passed = block.pass_barrier();
            if (passed) memory.races.barrier(block);
            without_progress =
                interpreter.progress ? 0 : without_progress + s64(interpreter.executed - before) + !passed;
            if (without_progress > launch.patience)
                fail(
                    "deadlock: %lld blocks have run %lld instructions since an atomic access changed "
                    "anything or a block ended",
                    (long long)blocks.size(), (long long)without_progress);
        }
        of_ended.let_arrive_beyond(0, random);
        return s64(interpreter.executed);
    }

private:
    void fill() {
        while (s64(blocks.size()) < launch.resident && next < order.size()) {
            blocks.push_back(std::make_unique<Block>(launch, order[next++]));
            memory.races.begin(*blocks.back());
        }
    }
    void turn(Block& block) {
        Warp& warp = block.warps[random() % block.warps.size()];
        try {
            interpreter.run(block, warp, 1 + s64(random() % u64(launch.quantum)));
        } catch (Fault& fault) {
            fail("block %lld warp %d, PTX line %d: %s", (long long)block.id, warp.id, warp.line,
                 fault.what.c_str());
        }
    }
    // What a block has not published arrives some time later, at the launch's end at the latest.
    void end(size_t n) {
        of_ended.take(blocks[n]->stores);
        of_ended.let_arrive_beyond(4096, random);
        memory.races.end(*blocks[n]);
        blocks.erase(blocks.begin() + s64(n));
        without_progress = 0;
        fill();
    }

    const Launch& launch;
    std::mt19937_64 random;
    GlobalMemory memory;
    Interpreter interpreter;
    std::vector<s64> order;  // in which blocks start
    size_t next = 0;
    std::vector<std::unique_ptr<Block>> blocks;
    StoreBuffer of_ended;
    s64 without_progress = 0;
};

}  // namespace ptx

// The number of instructions that warps have executed, or -1 with a message.
extern "C" [[gnu::visibility("default")]] ptx::s64 ptx_run(const ptx::Launch* launch) {
    try {
        ptx::Scheduler scheduler(*launch);
        return scheduler.run();
    } catch (const ptx::Fault& fault) {
        snprintf(launch->message, size_t(launch->message_bytes), "%s", fault.what.c_str());
        return -1;
    }
}
