// See cuda_runtime_api.h.
#include "cuda_runtime_api.h"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace emulation {

namespace {

constexpr int WARP = 32;
constexpr std::int64_t MOST_THREADS = 1024, MOST_SHARED = 48 * 1024, MOST_BLOCKS = 0x7fffffff;
constexpr std::size_t STACK = 256 * 1024, GUARD = 64;

enum class State { ready, waiting, done };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  std::jmp_buf place;
  bool is_started = false;
  State state = State::done;
  Operation operation{};
  std::uint32_t mask = 0, given = 0;
  int lane = 0;
  std::uint32_t received = 0;
  std::size_t shared = 0;  // where the next declaration is
};

// Shared memory of a block: objects between guards, all of it NaN at first.
std::vector<unsigned char> memory(2 * MOST_SHARED, 0xff);
std::vector<std::pair<std::size_t, std::size_t>> objects;
std::int64_t dynamic_end = 0;

std::vector<std::unique_ptr<Fiber>> fibers;
std::jmp_buf scheduler;
ucontext_t scheduler_start;
const std::function<void()>* current_kernel = nullptr;
unsigned current_block = 0, current_size = 0, current_thread = 0;
bool is_reversed = false;
std::string error;

void fail(const std::string& what) {
  if (error.empty()) {
    error = "block " + std::to_string(current_block) + ", thread " + std::to_string(current_thread) + ": " + what;
  }
}

const char* name_of(Operation operation) {
  constexpr const char* NAMES[] = {"__syncthreads", "__syncwarp", "a shuffle", "a ballot"};
  return NAMES[static_cast<int>(operation)];
}

void run_fiber() {
  for (;;) {
    (*current_kernel)();
    Fiber& fiber = *fibers[current_thread];
    fiber.state = State::done;
    if (_setjmp(fiber.place) == 0) {
      _longjmp(scheduler, 1);
    }
  }
}

void resume(unsigned thread) {
  current_thread = thread;
  Fiber& fiber = *fibers[thread];
  if (_setjmp(scheduler) == 0) {
    if (fiber.is_started) {
      _longjmp(fiber.place, 1);
    }
    fiber.is_started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = &scheduler_start;
    makecontext(&fiber.start, run_fiber, 0);
    setcontext(&fiber.start);
  }
}

// Lets a warp go on whose lanes all wait for the same operation on each other.
bool release_warp(unsigned first) {
  std::uint32_t votes = 0;
  for (int lane = 0; lane < WARP; ++lane) {
    const Fiber& fiber = *fibers[first + lane];
    if (fiber.state != State::waiting || fiber.operation == Operation::block_barrier) {
      return false;
    }
    votes |= (fiber.given != 0) << lane;
  }
  for (int lane = 0; lane < WARP; ++lane) {
    Fiber& fiber = *fibers[first + lane];
    if (fiber.operation != fibers[first]->operation || fiber.mask != 0xffffffffu) {
      fail(std::string("lanes of a warp meet in ") + name_of(fibers[first]->operation) + " and " +
           name_of(fiber.operation) + ", or with a mask that leaves some out");
      return false;
    }
    fiber.received = fiber.operation == Operation::ballot ? votes : fibers[first + fiber.lane]->given;
    fiber.state = State::ready;
  }
  return true;
}

bool release_block() {
  for (const auto& fiber : fibers) {
    if (fiber->state != State::waiting || fiber->operation != Operation::block_barrier) {
      return false;
    }
  }
  for (const auto& fiber : fibers) {
    fiber->state = State::ready;
  }
  return true;
}

// Everyone waits or is done, and nobody can go on.
void explain_deadlock() {
  for (current_thread = 0; current_thread < current_size; ++current_thread) {
    const Fiber& fiber = *fibers[current_thread];
    if (fiber.state == State::waiting) {
      return fail(std::string("waits in ") + name_of(fiber.operation) + " for threads that do not come");
    }
  }
}

void run_block() {
  std::fill(memory.begin(), memory.end(), 0xff);
  objects.clear();
  for (const auto& fiber : fibers) {
    fiber->state = State::ready;
    fiber->shared = static_cast<std::size_t>(dynamic_end) + GUARD;
  }
  for (unsigned left = current_size; left > 0 && error.empty();) {
    bool has_moved = false;
    for (unsigned i = 0; i < current_size; ++i) {
      const unsigned thread = is_reversed ? current_size - 1 - i : i;
      if (fibers[thread]->state == State::ready) {
        resume(thread);
        has_moved = true;
        left -= fibers[thread]->state == State::done;
      }
    }
    for (unsigned first = 0; first < current_size; first += WARP) {
      has_moved |= release_warp(first);
    }
    if (left > 0 && !release_block() && !has_moved) {
      explain_deadlock();
    }
  }
  std::size_t end = dynamic_end;
  objects.emplace_back(memory.size(), 0);
  for (const auto& [first, bytes] : objects) {
    for (; end < first; ++end) {
      if (memory[end] != 0xff) {
        return fail("a write beyond an object in shared memory");
      }
    }
    end = first + bytes;
  }
}

}  // namespace

Extent thread_index() {
  return {current_thread};
}
Extent block_index() {
  return {current_block};
}
Extent block_size() {
  return {current_size};
}

void* shared(std::size_t bytes, std::size_t alignment) {
  std::size_t& next = fibers[current_thread]->shared;
  const std::size_t first = (next + alignment - 1) / alignment * alignment;
  next = first + bytes + GUARD;
  if (next > memory.size()) {
    std::abort();
  }
  bool is_known = false;
  for (const auto& object : objects) {
    is_known |= object.first == first && object.second == bytes;
  }
  if (!is_known) {
    objects.emplace_back(first, bytes);
  }
  return memory.data() + first;
}

void* dynamic_shared() {
  return memory.data();
}

std::uint32_t meet(Operation operation, std::uint32_t mask, std::uint32_t value, int lane) {
  Fiber& fiber = *fibers[current_thread];
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.given = value;
  fiber.lane = lane;
  fiber.state = State::waiting;
  if (_setjmp(fiber.place) == 0) {
    _longjmp(scheduler, 1);
  }
  return fiber.received;
}

void launch(std::int64_t blocks, std::int64_t threads, std::int64_t dynamic_bytes,
            const std::function<void()>& kernel) {
  if (!error.empty()) {
    return;
  }
  if (blocks < 1 || blocks > MOST_BLOCKS || threads < 1 || threads > MOST_THREADS || threads % WARP != 0 ||
      dynamic_bytes > MOST_SHARED) {
    return fail("a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
                std::to_string(dynamic_bytes) + " bytes");
  }
  while (fibers.size() < static_cast<std::size_t>(threads)) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  fibers.resize(threads);
  current_kernel = &kernel;
  current_size = static_cast<unsigned>(threads);
  dynamic_end = dynamic_bytes;
  for (std::int64_t block = 0; block < blocks && error.empty(); ++block) {
    current_block = static_cast<unsigned>(is_reversed ? blocks - 1 - block : block);
    run_block();
  }
  if (!error.empty()) {
    fibers.clear();  // some are in the middle of the kernel
  }
}

}  // namespace emulation

namespace {

std::string last_error;

}  // namespace

cudaError_t cudaGetLastError() {
  last_error.swap(emulation::error);
  emulation::error.clear();
  return last_error.empty() ? 0 : 1;
}

const char* emulation_error() {
  return last_error.c_str();
}

// From Python: threads and blocks from the last to the first.
extern "C" void emulation_reverse(bool reversed) {
  emulation::is_reversed = reversed;
}
