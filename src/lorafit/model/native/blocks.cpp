// Memory of large tensors: blocks in a few sizes that are reused after they are freed, beside the C library's heap.
//
// A step allocates and frees the same large tensors in every layer. In the heap, tensors that live longer end up between
// freed ones, so the peak grows; releasing and faulting in pages again costs as much as a tenth of the step. Blocks of
// one size replace each other in any order. If the blocks held would exceed the most that were in use together plus
// `spare`, free blocks go back to the system, those that are free longest first.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <unordered_map>

namespace {
constexpr size_t LARGE = 1 << 20;   // smaller ones stay in the heap
constexpr size_t MOST_TIMES = 2;    // a block may be this many times as large as the request
constexpr int CLASSES = 8;          // sizes per doubling: at most an eighth is unused, and its pages are never touched

struct Free {
  void *at;
  size_t size;
};

size_t rounded(size_t size) {
  size_t step = LARGE / CLASSES;
  while (step * 2 * CLASSES <= size) step *= 2;
  return (size + step - 1) / step * step;
}

class Blocks final : public c10::Allocator {
 public:
  Blocks(c10::Allocator *heap, size_t spare) : heap(heap), spare(spare) {}

  c10::DataPtr allocate(size_t size) override {
    if (size < LARGE) return heap->allocate(size);
    void *at = take(rounded(size));
    TORCH_CHECK(at, "can't allocate memory: you tried to allocate ", size, " bytes.");
    return {at, at, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }

  void release(size_t least) {  // the longest free first
    while (held && least) {
      const Free block = free_.front();
      free_.pop_front();
      munmap(block.at, block.size);
      held -= block.size;
      least -= std::min(least, block.size);
    }
  }
  void release_all() {
    const std::lock_guard<std::mutex> guard(lock);
    release(held);
  }

 private:
  void *take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    auto best = free_.end();  // the smallest block that is large enough, of these the last freed: it may be in the cache
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->size >= size && block->size <= MOST_TIMES * size && (best == free_.end() || block->size <= best->size)) best = block;
    if (best != free_.end()) {
      const Free block = *best;
      free_.erase(best);
      held -= block.size;
      return taken(block.at, block.size);
    }
    if (used + held + size > most + spare) release(used + held + size - most - spare);
    void *at = map(size);
    if (at == MAP_FAILED) {
      release(held);
      at = map(size);
    }
    if (at == MAP_FAILED) return nullptr;
    return taken(at, size);
  }
  void *taken(void *at, size_t size) {
    used += size;
    most = std::max(most, used);
    sizes[at] = size;
    report(at, int64_t(size));
    return at;
  }
  void report(void *at, int64_t change) const {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(at, change, used, used + held, c10::Device(c10::DeviceType::CPU));
  }
  static void *map(size_t size) { return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
  static void give(void *at);

  c10::Allocator *heap;
  const size_t spare;
  std::mutex lock;
  std::deque<Free> free_;  // in the order in which they were freed
  std::unordered_map<void *, size_t> sizes;  // of the blocks in use
  size_t held = 0, used = 0, most = 0;  // bytes of free blocks, of blocks in use, and the maximum in use
};

Blocks *blocks = nullptr;

void Blocks::give(void *at) {
  std::unique_lock<std::mutex> guard(blocks->lock);
  const auto found = blocks->sizes.find(at);
  if (found == blocks->sizes.end()) {  // a small allocation of raw memory
    guard.unlock();
    return blocks->heap->raw_deallocate(at);
  }
  blocks->free_.push_back({at, found->second});
  blocks->held += found->second;
  blocks->used -= found->second;
  blocks->report(at, -int64_t(found->second));
  blocks->sizes.erase(found);
}
}  // namespace

extern "C" void keep_blocks(size_t spare) {
  if (blocks) return;
  blocks = new Blocks(c10::GetCPUAllocator(), spare);
  c10::SetCPUAllocator(blocks, 1);
}
extern "C" void release_blocks() {
  if (blocks) blocks->release_all();
}
