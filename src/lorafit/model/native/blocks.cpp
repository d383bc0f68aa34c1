// A caching allocator for large tensors: blocks in a few size classes that are kept when freed and used again.
//
// A step allocates and frees the same large tensors in every layer. In the C library's heap, live blocks fragment the
// free memory, so the peak grows. If freed pages go back to the system, page faults cost up to a tenth of the step.
// Blocks of one size class can replace each other in any order. The total of used and free blocks stays within the peak
// of used bytes plus `spare`: before an allocation exceeds it, free blocks go back to the system, the oldest first.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <unordered_map>

namespace {
constexpr size_t LARGE = 1 << 20;   // smaller allocations use the heap
constexpr size_t MAX_SIZE_RATIO = 2;    // largest ratio of a block's size to the requested size
constexpr int CLASSES = 8;          // size classes per doubling: at most an eighth is unused, and its pages are never touched

struct Free {
  void *address;
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
    void *address = allocate_block(rounded(size));
    TORCH_CHECK(address, "can't allocate memory: you tried to allocate ", size, " bytes.");
    return {address, address, &free_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }

  void release(size_t bytes) {  // frees the oldest blocks first
    while (free_bytes && bytes) {
      const Free block = free_blocks.front();
      free_blocks.pop_front();
      munmap(block.address, block.size);
      free_bytes -= block.size;
      bytes -= std::min(bytes, block.size);
    }
  }
  void release_all() {
    const std::lock_guard<std::mutex> guard(lock);
    release(free_bytes);
  }

 private:
  void *allocate_block(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    auto best = free_blocks.end();  // the smallest block that fits; of equal ones the last freed, which may be in the cache
    for (auto block = free_blocks.begin(); block != free_blocks.end(); ++block)
      if (block->size >= size && block->size <= MAX_SIZE_RATIO * size &&
          (best == free_blocks.end() || block->size <= best->size))
        best = block;
    if (best != free_blocks.end()) {
      const Free block = *best;
      free_blocks.erase(best);
      free_bytes -= block.size;
      return register_block(block.address, block.size);
    }
    if (used_bytes + free_bytes + size > peak_bytes + spare) release(used_bytes + free_bytes + size - peak_bytes - spare);
    void *address = map(size);
    if (address == MAP_FAILED) {
      release(free_bytes);
      address = map(size);
    }
    if (address == MAP_FAILED) return nullptr;
    return register_block(address, size);
  }
  void *register_block(void *address, size_t size) {
    used_bytes += size;
    peak_bytes = std::max(peak_bytes, used_bytes);
    sizes[address] = size;
    report_change(address, int64_t(size));
    return address;
  }
  void report_change(void *address, int64_t change) const {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(address, change, used_bytes, used_bytes + free_bytes, c10::Device(c10::DeviceType::CPU));
  }
  static void *map(size_t size) { return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
  static void free_block(void *address);

  c10::Allocator *heap;
  const size_t spare;
  std::mutex lock;
  std::deque<Free> free_blocks;  // in the order of being freed
  std::unordered_map<void *, size_t> sizes;  // sizes of the used blocks
  size_t free_bytes = 0, used_bytes = 0, peak_bytes = 0;  // bytes of free blocks, of used blocks, and the peak of used blocks
};

Blocks *blocks = nullptr;

void Blocks::free_block(void *address) {
  std::unique_lock<std::mutex> guard(blocks->lock);
  const auto entry = blocks->sizes.find(address);
  if (entry == blocks->sizes.end()) {  // a small allocation from raw_allocate
    guard.unlock();
    return blocks->heap->raw_deallocate(address);
  }
  blocks->free_blocks.push_back({address, entry->second});
  blocks->free_bytes += entry->second;
  blocks->used_bytes -= entry->second;
  blocks->report_change(address, -int64_t(entry->second));
  blocks->sizes.erase(entry);
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
