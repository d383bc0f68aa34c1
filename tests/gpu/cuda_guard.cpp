// Guards of CUDA and MPS devices, and hooks that do nothing: autograd then works on tensors that no device stands
// behind, in a torch for the CPU alone and in one for CUDA without a driver. Load it before torch (tests/gpu/guard.py).
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
bool is_mps = false;  // whether MPS is the accelerator, in the place of CUDA

template <c10::DeviceType type>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<type> {
  c10::Device exchangeDevice(c10::Device) const override { return {type, 0}; }
  c10::Device getDevice() const override { return {type, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void *, const c10::Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(type, 0)); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return !is_mps; }
  bool isBuilt() const override { return !is_mps; }
  bool isAvailable() const override { return !is_mps; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void *) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

struct MpsHooks final : at::MPSHooksInterface {
  template <typename... Words>
  explicit MpsHooks(Words...) {}  // older versions of torch give it an argument
  void init() const override {}
  bool hasMPS() const override { return is_mps; }
  bool isBuilt() const override { return is_mps; }
  bool isAvailable() const override { return is_mps; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void *) const override { return false; }
};
}  // namespace

extern "C" void simulate_mps(bool wanted) { is_mps = wanted; }

extern "C" void install_guard() {  // once torch is loaded; it replaces the guard of a build for CUDA
  static Guard<c10::DeviceType::CUDA> cuda;
  static Guard<c10::DeviceType::MPS> mps;
  c10::impl::DeviceGuardImplRegistrar(c10::DeviceType::CUDA, &cuda);
  c10::impl::DeviceGuardImplRegistrar(c10::DeviceType::MPS, &mps);
}

namespace at {
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks)
C10_REGISTER_CLASS_WITH_PRIORITY(MPSHooksRegistry, MPSHooks, c10::REGISTRY_PREFERRED, MpsHooks)
}
