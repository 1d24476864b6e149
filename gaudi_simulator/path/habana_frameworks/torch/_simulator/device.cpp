// A PyTorch `hpu` device whose memory is host memory.
//
// Every tensor of a card has a twin: a CPU tensor over the same bytes. An operation on the card runs the CPU kernel on the
// twins, so that its result is the CPU's to the bit, and no byte is copied. What the simulator adds is what a card has and a
// CPU has not: a memory limit and figures of memory in use, a random generator of its own, graphs that are compiled when their
// operations, shapes or dtypes are new, and a host that must wait when it asks for a value.
//
// No Python header is used: Python reaches the C functions at the end through ctypes, and the few functions that take or
// return tensors through torch.ops.gaudi_simulator.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr auto kHPU = c10::DeviceType::HPU;
constexpr int kMaxCards = 64;

int number_from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoi(text) : otherwise;
}

const int card_count = std::min(number_from_environment("GAUDI_SIMULATOR", 1), kMaxCards);
const bool lazy_mode = number_from_environment("PT_HPU_LAZY_MODE", 1) != 0;
// Without products a run is for its counts alone, and takes a fraction of the time.
const bool with_products = number_from_environment("GAUDI_SIMULATOR_PRODUCTS", 1) != 0;
thread_local c10::DeviceIndex current_card = 0;

// ------------------------------------------------------------------------------------------------------------ memory

struct Card {
  std::atomic<int64_t> in_use{0}, peak{0}, allocations{0}, frees{0}, largest{0}, total{0};
};
std::array<Card, kMaxCards> cards;

int64_t memory_limit() {
  static const int64_t limit = [] {
    const char* text = std::getenv("GAUDI_SIMULATOR_MEMORY_GB");
    return static_cast<int64_t>((text && *text ? std::atof(text) : 96.0) * (int64_t{1} << 30));
  }();
  return limit;
}

void charge(c10::DeviceIndex index, int64_t bytes) {
  Card& card = cards[index];
  const int64_t in_use = card.in_use += bytes;
  if (in_use > memory_limit()) {
    card.in_use -= bytes;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "Allocation failed for size :", bytes, " (", bytes / 1048576, ")MB: simulated hpu:", static_cast<int>(index),
        " is out of memory, with ", (in_use - bytes) / 1048576, " MB of ", memory_limit() / 1048576,
        " MB in use (the limit is GAUDI_SIMULATOR_MEMORY_GB)");
  }
  int64_t peak = card.peak;
  while (in_use > peak && !card.peak.compare_exchange_weak(peak, in_use)) {
  }
  int64_t largest = card.largest;
  while (bytes > largest && !card.largest.compare_exchange_weak(largest, bytes)) {
  }
  card.total += bytes;
  ++card.allocations;
}

// The memory behind the storage of a card's tensor: the storage of its twin.
struct Block {
  c10::Storage host;
  int64_t bytes;
  c10::DeviceIndex card;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  cards[block->card].in_use -= block->bytes;
  ++cards[block->card].frees;
  delete block;
}

c10::DataPtr card_pointer(c10::Storage host, c10::DeviceIndex card) {
  const auto bytes = static_cast<int64_t>(host.nbytes());
  charge(card, bytes);
  void* data = host.mutable_data();
  return {data, new Block{std::move(host), bytes, card}, &free_block, c10::Device(kHPU, card)};
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(
        OutOfMemoryError, static_cast<int64_t>(bytes) <= memory_limit(), "Allocation failed for size :", bytes, " (",
        bytes / 1048576, ")MB: a simulated card has ", memory_limit() / 1048576,
        " MB (the limit is GAUDI_SIMULATOR_MEMORY_GB)");
    auto* host = c10::GetCPUAllocator();
    return card_pointer(
        c10::Storage(c10::Storage::use_byte_size_t(), bytes, host->allocate(bytes), host, true), current_card);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
CardAllocator card_allocator;

// Page-locked memory is ordinary host memory here, but it is remembered, so that `is_pinned` answers as on a real host.
struct PinnedAllocator final : c10::Allocator {
  // Never destroyed: memory may be freed after the destructors of this library have run.
  static std::mutex& mutex;
  static std::map<const char*, size_t>& ranges;
  static void free(void* data) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ranges.erase(static_cast<const char*>(data));
    }
    c10::free_cpu(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    if (data) {
      const std::lock_guard<std::mutex> lock(mutex);
      ranges[static_cast<const char*>(data)] = bytes;
    }
    return {data, data, &PinnedAllocator::free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &PinnedAllocator::free;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  static bool holds(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto after = ranges.upper_bound(static_cast<const char*>(data));
    if (after == ranges.begin()) {
      return false;
    }
    const auto& [start, bytes] = *std::prev(after);
    return static_cast<const char*>(data) < start + bytes;
  }
};
std::mutex& PinnedAllocator::mutex = *new std::mutex;
std::map<const char*, size_t>& PinnedAllocator::ranges = *new std::map<const char*, size_t>;
PinnedAllocator pinned_allocator;

// -------------------------------------------------------------------------------------------------------------- twins

bool on_card(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kHPU;
}

c10::Storage host_storage(const c10::Storage& storage) {
  if (auto* block = storage.data_ptr().cast_context<Block>(&free_block)) {
    return block->host;
  }
  // A storage that was emptied, or whose pointer somebody else supplied.
  auto keep = std::make_unique<c10::Storage>(storage);
  return c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(
          storage.mutable_data(), keep.release(), [](void* context) { delete static_cast<c10::Storage*>(context); },
          at::kCPU),
      c10::GetCPUAllocator(), true);
}

at::Tensor twin(const at::Tensor& tensor) {
  if (!on_card(tensor)) {
    return tensor;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, "the simulated card has no sparse tensors");
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      host_storage(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = host.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) {
    host._set_conj(true);
  }
  if (tensor.is_neg()) {
    host._set_neg(true);
  }
  return host;
}

at::Tensor over_storage(c10::Storage storage, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::HPU), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) {
    tensor._set_conj(true);
  }
  if (like.is_neg()) {
    tensor._set_neg(true);
  }
  return tensor;
}

// The tensor of the card whose twin `host` is, for a result in new memory.
at::Tensor adopt(const at::Tensor& host, c10::DeviceIndex card) {
  TORCH_CHECK_NOT_IMPLEMENTED(host.layout() == at::kStrided, "the simulated card has no sparse tensors");
  const auto& storage = host.storage();
  return over_storage(
      c10::Storage(
          c10::Storage::use_byte_size_t(), storage.nbytes(), card_pointer(storage, card), &card_allocator, true),
      host);
}

// A kernel may have resized or replaced the twin of an output: follow it.
void follow(const at::Tensor& tensor, const at::Tensor& host) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const auto& storage = tensor.storage();
  auto* block = storage.data_ptr().cast_context<Block>(&free_block);
  if (!block || block->host.unsafeGetStorageImpl() != host.storage().unsafeGetStorageImpl()) {
    if (host.storage().data() == storage.data() && host.storage().nbytes() == storage.nbytes()) {
      return;
    }
    impl->set_storage_keep_dtype(adopt(host, tensor.device().index()).storage());
  } else if (block->host.data() != storage.data() || block->host.nbytes() != storage.nbytes()) {
    const auto bytes = block->host.nbytes();
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(card_pointer(block->host, block->card));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides() ||
      tensor.storage_offset() != host.storage_offset()) {
    impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
}

// ------------------------------------------------------------------------------------------------------------- graphs

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 29);
}

// Lazy mode: the operations between two marks, or up to a point where the host must wait, are one graph. A graph is its
// operations in order with the shapes and dtypes of their operands and those arguments that a compiler bakes in: integers,
// lists of integers, flags, and floating-point attributes such as `alpha`. Not part of it: the values of tensors, and so the
// value of a number in `x * 0.5`, which PyTorch hands over as a tensor of no dimension; random seeds; what the optimizer
// kernels get as numbers, because the real ones take tensors there.
// In eager mode every operation is a graph by itself.
class Graphs {
 public:
  struct Compilation {
    int64_t operations;
    int64_t position;
    std::string first;
  };

  // A view computes nothing: it is part of a graph, but it is not what one is named by.
  template <class Describe>
  void add(uint64_t operation, bool is_view, Describe describe) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto [entry, is_new] = descriptions_.try_emplace(operation);
    if (is_new) {
      entry->second = describe();
    }
    if (!lazy_mode && regions_ == 0) {
      if (is_new) {
        compiled({1, 0, entry->second});
      }
      return;
    }
    prefix_ = mix(prefix_, operation);
    last_ = &entry->second;
    if (prefixes_.insert(prefix_).second && (!divergence_ || divergence_is_view_)) {
      divergence_ = last_;
      divergence_is_view_ = is_view;
      position_ = length_;
    }
    ++length_;
  }

  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    close_locked();
  }

  // A region is one graph whatever the mode: an HPU graph, or what torch.compile traced.
  void open_region() {
    const std::lock_guard<std::mutex> lock(mutex_);
    close_locked();
    ++regions_;
    prefix_ = kRegion;
  }

  void close_region() {
    const std::lock_guard<std::mutex> lock(mutex_);
    close_locked();
    --regions_;
    prefix_ = regions_ ? kRegion : kStart;
  }

  void host_sync(const std::string& operation) {
    const std::lock_guard<std::mutex> lock(mutex_);
    close_locked();
    ++syncs_[operation];
    ++sync_count_;
  }

  int64_t compilations() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return compilation_count_;
  }

  int64_t host_syncs() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sync_count_;
  }

  std::vector<Compilation> history() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return history_;
  }

  std::map<std::string, int64_t> syncs() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return syncs_;
  }

 private:
  static constexpr uint64_t kStart = 1;
  static constexpr uint64_t kRegion = 2;
  static constexpr size_t kHistory = 10000;

  void compiled(Compilation compilation) {
    ++compilation_count_;
    if (history_.size() < kHistory) {
      history_.push_back(std::move(compilation));
    }
  }

  void close_locked() {
    if (length_ == 0) {
      return;
    }
    if (graphs_.insert(prefix_).second) {
      // Without a divergence the operations are the beginning of a graph already known, and end here.
      compiled({length_, divergence_ ? position_ : length_ - 1, divergence_ ? *divergence_ : "end after " + *last_});
    }
    prefix_ = regions_ ? kRegion : kStart;
    length_ = position_ = 0;
    divergence_ = last_ = nullptr;
  }

  std::mutex mutex_;
  std::unordered_map<uint64_t, std::string> descriptions_;
  std::unordered_set<uint64_t> prefixes_, graphs_;
  std::vector<Compilation> history_;
  std::map<std::string, int64_t> syncs_;
  uint64_t prefix_ = kStart;
  int64_t length_ = 0, position_ = 0, compilation_count_ = 0, sync_count_ = 0;
  int regions_ = 0;
  const std::string* divergence_ = nullptr;
  bool divergence_is_view_ = false;
  const std::string* last_ = nullptr;
};
Graphs& graphs = *new Graphs;

void append_shape(std::ostream& out, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    out << "none";
    return;
  }
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    out << (i ? ", " : "") << tensor.size(i);
  }
  out << "] " << c10::toString(tensor.scalar_type());
}

uint64_t hash_tensor(uint64_t hash, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return mix(hash, 3);
  }
  hash = mix(hash, static_cast<uint64_t>(tensor.scalar_type()) * 2 + (on_card(tensor) ? 1 : 0));
  for (const auto size : tensor.sizes()) {
    hash = mix(hash, static_cast<uint64_t>(size));
  }
  return mix(hash, 5);
}

// An explicit HPU graph: the operations of its capture, run again in the same memory by a replay.
struct Capture {
  std::vector<std::function<void()>> operations;
  std::vector<std::pair<at::Tensor, at::Tensor>> before;  // memory that the capture wrote to, and what it held
};
Capture* capturing = nullptr;

void before_write(const at::Tensor& host) {
  capturing->before.emplace_back(host, host.clone());
}

void host_sync(const std::string& operation) {
  TORCH_CHECK(
      !capturing, operation, " needs a value on the host, which is not supported during hpu graph capturing");
  graphs.host_sync(operation);
}

// -------------------------------------------------------------------------------------------------------------- random

struct CardGenerator final : c10::GeneratorImpl {
  explicit CardGenerator(c10::DeviceIndex card)
      : GeneratorImpl(c10::Device(kHPU, card), c10::DispatchKeySet(c10::DispatchKey::HPU)),
        host(at::make_generator<at::CPUGeneratorImpl>()) {}
  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    host.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host.get_offset();
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  CardGenerator* clone_impl() const override {
    auto* copy = new CardGenerator(device().index());
    copy->host = host.clone();
    return copy;
  }
  at::Generator host;
};

const at::Generator& default_generator(c10::DeviceIndex card) {
  static const std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < card_count; ++i) {
      made.push_back(at::make_generator<CardGenerator>(static_cast<c10::DeviceIndex>(i)));
    }
    return made;
  }();
  if (card == -1) {
    card = current_card;
  }
  TORCH_CHECK(card >= 0 && card < card_count, "hpu:", static_cast<int>(card), " does not exist");
  return generators[card];
}

at::Generator host_generator(const at::Generator& generator) {
  auto* card = dynamic_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(card, "Expected a 'hpu' device type for generator but found '", generator.device().type(), "'");
  return card->host;
}

// ---------------------------------------------------------------------------------------------------------- operations

struct Operation {
  std::string name;
  uint64_t hash;
  bool product = false;          // bf16 and fp16 operands are multiplied in fp32
  bool numbers_are_inputs = false;
  bool takes_host_tensors = false;
  bool indexes = false;
  bool view = false;
  bool syncs = false;            // the shape or value of its result depends on values
  std::vector<size_t> written;   // arguments
  std::optional<size_t> generator;
};

const std::unordered_set<std::string> kProducts = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "dot", "vdot", "_addmm_activation",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"};
const std::unordered_set<std::string> kSyncs = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "equal", "bincount", "repeat_interleave"};
const std::unordered_set<std::string> kIndexing = {"index", "index_put", "index_put_", "_index_put_impl_",
                                                   "_unsafe_index", "_unsafe_index_put"};

const Operation& describe(const c10::OperatorHandle& handle) {
  thread_local std::unordered_map<const void*, const Operation*> mine;
  const auto* key = static_cast<const void*>(&handle.schema());
  if (auto found = mine.find(key); found != mine.end()) {
    return *found->second;
  }
  static std::mutex mutex;
  static std::unordered_map<const void*, Operation> all;
  const std::lock_guard<std::mutex> lock(mutex);
  auto [entry, is_new] = all.try_emplace(key);
  if (is_new) {
    const auto& schema = handle.schema();
    const auto& full = schema.operator_name().name;
    const auto base = full.substr(full.find("::") + 2);
    auto& operation = entry->second;
    operation.name = base;
    operation.hash = std::hash<std::string>()(full + "." + schema.operator_name().overload_name);
    operation.product = kProducts.count(base) > 0;
    operation.syncs = kSyncs.count(base) > 0;
    operation.indexes = kIndexing.count(base) > 0;
    operation.takes_host_tensors = operation.indexes;
    operation.view = !schema.returns().empty() && schema.returns()[0].alias_info() &&
        !schema.returns()[0].alias_info()->isWrite();
    operation.numbers_are_inputs = base.rfind("_fused_", 0) == 0;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto& argument = schema.arguments()[i];
      if (argument.alias_info() && argument.alias_info()->isWrite()) {
        operation.written.push_back(i);
      }
      if (argument.type()->str().rfind("Generator", 0) == 0) {
        operation.generator = i;
      }
    }
  }
  mine[key] = &entry->second;
  return entry->second;
}

bool is_narrow(const at::Tensor& tensor) {
  return tensor.defined() && (tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf);
}

// Without AVX512 or AMX the CPU multiplies bf16 ten times slower than fp32: widen, multiply, round once.
void multiply_wide(const c10::OperatorHandle& handle, const Operation& operation, torch::jit::Stack* stack) {
  const auto arguments = handle.schema().arguments().size();
  const auto base = stack->size() - arguments;
  std::optional<at::ScalarType> narrow;
  std::vector<std::pair<at::Tensor, at::Tensor>> outputs;
  for (size_t i = 0; i < arguments; ++i) {
    auto& value = (*stack)[base + i];
    if (value.isTensor() && is_narrow(value.toTensor())) {
      auto original = value.toTensor();
      narrow = original.scalar_type();
      auto wide = original.to(at::kFloat);
      const auto& written = operation.written;
      if (std::find(written.begin(), written.end(), i) != written.end()) {
        outputs.emplace_back(original, wide);
      }
      value = std::move(wide);
    }
  }
  handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto results = handle.schema().returns().size();
  for (size_t i = 0; narrow && i < results; ++i) {
    auto& value = (*stack)[stack->size() - results + i];
    // The flash kernel keeps the log-sum-exp, its second result, in fp32 for narrow operands too.
    if (!value.isTensor() || !value.toTensor().defined() || (i == 1 && results == 2)) {
      continue;
    }
    auto result = value.toTensor();
    bool is_output = false;
    for (auto& [original, wide] : outputs) {
      if (result.is_same(wide)) {
        original.copy_(wide);
        value = original;
        is_output = true;
      }
    }
    if (!is_output && result.scalar_type() == at::kFloat) {
      value = result.to(*narrow);
    }
  }
}

const std::unordered_map<std::string, size_t> kFirstFactor = {{"mm", 0}, {"bmm", 0}, {"addmm", 1}, {"baddbmm", 1}};

// The same operation with results of the same shapes, over factors that have nothing to sum up.
void leave_out_product(const Operation& operation, c10::IValue* arguments) {
  if (const auto found = kFirstFactor.find(operation.name); found != kFirstFactor.end()) {
    auto &left = arguments[found->second], &right = arguments[found->second + 1];
    left = left.toTensor().narrow(-1, 0, 0);
    right = right.toTensor().narrow(-2, 0, 0);
  }
}

// Of factors of several types, which PyTorch refuses; widened, they would be multiplied.
bool are_mixed(const Operation& operation, const c10::IValue* arguments, size_t count) {
  std::unordered_set<at::ScalarType> types;
  for (size_t i = 0; i < count; ++i) {
    if (arguments[i].isTensor() && arguments[i].toTensor().defined()) {
      types.insert(arguments[i].toTensor().scalar_type());
    }
  }
  return types.size() > 1 && operation.name.rfind("_scaled_dot_product", 0) != 0;
}

void run(const c10::OperatorHandle& handle, const Operation& operation, torch::jit::Stack* stack) {
  const auto count = handle.schema().arguments().size();
  auto* arguments = &(*stack)[stack->size() - count];
  if (operation.product && !with_products) {
    leave_out_product(operation, arguments);
  }
  if (operation.product && !are_mixed(operation, arguments, count)) {
    multiply_wide(handle, operation, stack);
  } else {
    handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
}

void record(const c10::OperatorHandle& handle, const Operation& operation, std::vector<c10::IValue> arguments,
            std::vector<c10::IValue> results) {
  capturing->operations.emplace_back([=, &operation] {
    torch::jit::Stack stack(arguments.begin(), arguments.end());
    run(handle, operation, &stack);
    const auto store = [](const at::Tensor& into, const at::Tensor& from) {
      if (into.defined() && into.storage().data() != from.storage().data()) {
        into.copy_(from);
      }
    };
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].isTensor()) {
        store(results[i].toTensor(), stack[i].toTensor());
      } else if (results[i].isTensorList()) {
        const auto into = results[i].toTensorVector();
        const auto from = stack[i].toTensorVector();
        for (size_t j = 0; j < into.size(); ++j) {
          store(into[j], from[j]);
        }
      }
    }
  });
}

struct Operand {
  at::Tensor tensor;
  at::Tensor host;
};

class Call {
 public:
  Call(const c10::OperatorHandle& handle, torch::jit::Stack* stack)
      : handle_(handle), operation_(describe(handle)), stack_(stack), hash_(operation_.hash) {}

  void operator()() {
    const auto arguments = handle_.schema().arguments().size();
    base_ = stack_->size() - arguments;
    note_ = operation_.syncs;
    for (size_t i = 0; i < arguments; ++i) {
      auto& value = (*stack_)[base_ + i];
      if (operation_.generator == i) {
        generator_ = &value;
      } else {
        value = convert(std::move(value));
      }
    }
    check_devices();
    const c10::DeviceIndex card = card_ >= 0 ? card_ : current_card;
    if (generator_) {
      *generator_ = host_generator(generator_->isNone() ? default_generator(card) : generator_->toGenerator());
    }
    const std::vector<c10::IValue> arguments_of_call =
        capturing ? std::vector<c10::IValue>(stack_->begin() + base_, stack_->end()) : std::vector<c10::IValue>();
    if (capturing) {
      TORCH_CHECK(
          !note_, operation_.name, " has a result of unknown shape, which is not supported during hpu graph capturing");
      for (const auto index : operation_.written) {
        for_each_tensor((*stack_)[base_ + index], before_write);
      }
    }
    graphs.add(hash_, operation_.view, [&] { return text(); });
    run(handle_, operation_, stack_);
    if (capturing) {
      record(handle_, operation_, arguments_of_call, {stack_->begin() + base_, stack_->end()});
    }
    if (!operation_.written.empty()) {
      for (const auto& operand : operands_) {
        follow(operand.tensor, operand.host);
      }
    }
    for (size_t i = base_; i < stack_->size(); ++i) {
      auto& value = (*stack_)[i];
      if (value.isTensor()) {
        value = result(value.toTensor(), card);
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const auto& item : value.toListRef()) {
          list.push_back(result(item.toTensor(), card));
        }
        value = std::move(list);
      }
    }
    if (note_) {
      host_sync(operation_.name);
    }
  }

 private:
  template <class F>
  static void for_each_tensor(const c10::IValue& value, F function) {
    if (value.isTensor() && value.toTensor().defined()) {
      function(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& item : value.toListRef()) {
        function(item.toTensor());
      }
    }
  }

  at::Tensor operand(const at::Tensor& tensor) {
    hash_ = hash_tensor(hash_, tensor);
    if (!tensor.defined()) {
      return tensor;
    }
    if (on_card(tensor)) {
      const auto card = tensor.device().index();
      TORCH_CHECK(
          card_ < 0 || card_ == card || from_device_argument_,
          "Expected all tensors to be on the same device, but found at least two devices, hpu:", static_cast<int>(card_),
          " and hpu:", static_cast<int>(card), "!");
      card_ = card;
      from_device_argument_ = false;
      operands_.push_back({tensor, twin(tensor)});
      if (operation_.indexes && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte) && in_list_) {
        note_ = true;  // a mask: the number of elements that it picks is not known
      }
      return operands_.back().host;
    }
    if (tensor.dim() > 0) {
      host_tensor_ = true;
    }
    return tensor;
  }

  c10::IValue convert(c10::IValue value) {
    if (value.isTensor()) {
      return operand(value.toTensor());
    }
    if (value.isNone()) {
      hash_ = mix(hash_, 7);
      return value;
    }
    if (value.isInt()) {
      hash_ = mix(hash_, static_cast<uint64_t>(value.toInt()));
      return value;
    }
    if (value.isBool()) {
      hash_ = mix(hash_, value.toBool() ? 11 : 13);
      return value;
    }
    if (value.isDouble()) {
      hash_number(value.toDouble());
      return value;
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      const auto items = value.toListRef();
      list.reserve(items.size());
      for (const auto& item : items) {
        list.push_back(operand(item.toTensor()));
      }
      hash_ = mix(hash_, 17);
      return list;
    }
    if (value.isDevice()) {
      const auto device = value.toDevice();
      if (device.type() != kHPU) {
        return value;
      }
      if (card_ < 0) {
        card_ = device.has_index() ? device.index() : current_card;
        from_device_argument_ = true;
      }
      return c10::Device(at::kCPU);
    }
    if (value.isList()) {
      if (value.isOptionalTensorList()) {
        in_list_ = true;
        c10::List<std::optional<at::Tensor>> list;
        for (const auto& item : value.toListRef()) {
          list.push_back(item.isNone() ? std::nullopt : std::optional<at::Tensor>(operand(item.toTensor())));
        }
        in_list_ = false;
        return list;
      }
      for (const auto& item : value.toListRef()) {
        if (item.isInt()) {
          hash_ = mix(hash_, static_cast<uint64_t>(item.toInt()));
        } else if (item.isDouble()) {
          hash_number(item.toDouble());
        } else if (item.isBool()) {
          hash_ = mix(hash_, item.toBool());
        }
      }
      hash_ = mix(hash_, 19);
      return value;
    }
    if (value.isString()) {
      hash_ = mix(hash_, std::hash<std::string>()(value.toStringRef()));
    }
    return value;
  }

  void hash_number(double number) {
    if (!operation_.numbers_are_inputs) {
      uint64_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      hash_ = mix(hash_, bits);
    }
  }

  void check_devices() const {
    TORCH_CHECK(
        !host_tensor_ || operands_.empty() || operation_.takes_host_tensors,
        "Expected all tensors to be on the same device, but found at least two devices, hpu:", static_cast<int>(card_),
        " and cpu! (when running aten::", operation_.name, ")");
  }

  at::Tensor result(const at::Tensor& host, c10::DeviceIndex card) const {
    if (!host.defined()) {
      return host;
    }
    for (const auto& operand : operands_) {
      if (operand.host.is_same(host)) {
        return operand.tensor;
      }
    }
    const auto* storage = host.layout() == at::kStrided ? host.storage().unsafeGetStorageImpl() : nullptr;
    for (const auto& operand : operands_) {
      if (operand.host.storage().unsafeGetStorageImpl() == storage) {
        return over_storage(operand.tensor.storage(), host);
      }
    }
    return adopt(host, card);
  }

  std::string text() const {
    std::ostringstream out;
    out << operation_.name << '(';
    for (size_t i = 0; i < operands_.size() && i < 4; ++i) {
      out << (i ? ", " : "");
      append_shape(out, operands_[i].tensor);
    }
    out << (operands_.size() > 4 ? ", ...)" : ")");
    return out.str();
  }

  const c10::OperatorHandle& handle_;
  const Operation& operation_;
  torch::jit::Stack* stack_;
  c10::SmallVector<Operand, 6> operands_;
  c10::IValue* generator_ = nullptr;
  uint64_t hash_;
  size_t base_ = 0;
  c10::DeviceIndex card_ = -1;
  bool from_device_argument_ = false;
  bool host_tensor_ = false;
  bool in_list_ = false;
  bool note_ = false;
};

void run_on_twins(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  Call(handle, stack)();
}

// ------------------------------------------------------------------------------ operations that are not a CPU kernel's

c10::DeviceIndex index_of(std::optional<c10::Device> device) {
  return device && device->has_index() ? device->index() : current_card;
}

struct CardGuard {
  explicit CardGuard(c10::DeviceIndex card) : before(current_card) {
    TORCH_CHECK(card < card_count, "hpu:", static_cast<int>(card), " does not exist: there are ", card_count, " cards");
    current_card = card;
  }
  ~CardGuard() {
    current_card = before;
  }
  c10::DeviceIndex before;
};

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      layout.value_or(at::kStrided) == at::kStrided, "the simulated card has no sparse tensors");
  const CardGuard guard(index_of(device));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &card_allocator, c10::DispatchKeySet(c10::DispatchKey::HPU),
      dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const CardGuard guard(index_of(device));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &card_allocator,
      c10::DispatchKeySet(c10::DispatchKey::HPU), dtype.value_or(at::get_default_dtype_as_scalartype()));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  static const uint64_t name = std::hash<std::string>()("copy_");
  const auto into = twin(self);
  const auto from = twin(source);
  if (!on_card(self)) {
    if (non_blocking) {
      graphs.close();
    } else {
      host_sync("copy to host");
    }
    into.copy_(from);
    return self;
  }
  graphs.add(hash_tensor(hash_tensor(name, self), source), false, [&] {
    std::ostringstream out;
    out << (on_card(source) ? "copy(" : "copy from host(");
    append_shape(out, source);
    out << ')';
    return out.str();
  });
  if (capturing) {
    before_write(into);
    capturing->operations.emplace_back([into, from] { into.copy_(from); });
  }
  into.copy_(from);
  return self;
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  host_sync("item");
  return twin(tensor).item();
}

at::Tensor& set_storage_offset(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !sizes.empty()) {
    impl->set_sizes_contiguous(sizes);
    impl->set_storage_offset(offset.expect_int());
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  auto* impl = self.unsafeGetTensorImpl();
  const auto elements = static_cast<int64_t>(source.nbytes() / self.itemsize());
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(0);
  impl->set_sizes_contiguous({elements});
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}

void record_stream(at::Tensor&, c10::Stream) {}

// PyTorch asks a device that it does not know for these two in place of its own convolutions.
at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  auto hash = hash_tensor(hash_tensor(std::hash<std::string>()("convolution"), input), weight);
  graphs.add(hash, false, [&] {
    std::ostringstream out;
    out << "convolution(";
    append_shape(out, input);
    out << ", ";
    append_shape(out, weight);
    out << ')';
    return out.str();
  });
  const auto host = at::convolution_symint(
      twin(input), twin(weight), bias ? std::optional<at::Tensor>(twin(*bias)) : std::nullopt, stride, padding, dilation,
      transposed, output_padding, groups);
  return adopt(host.contiguous(), input.device().index());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  auto hash = hash_tensor(hash_tensor(std::hash<std::string>()("convolution_backward"), gradient), weight);
  graphs.add(hash, false, [&] {
    std::ostringstream out;
    out << "convolution_backward(";
    append_shape(out, gradient);
    out << ')';
    return out.str();
  });
  const std::vector<c10::SymInt> bias_size{weight.sym_size(transposed ? 1 : 0) * (transposed ? groups : c10::SymInt(1))};
  auto [to_input, to_weight, to_bias] = at::convolution_backward_symint(
      twin(gradient), twin(input), twin(weight), c10::SymIntArrayRef(bias_size), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  const auto card = input.device().index();
  const auto back = [card](const at::Tensor& host) {
    return host.defined() ? adopt(host.contiguous(), card) : host;
  };
  return {back(to_input), back(to_weight), back(to_bias)};
}

// A CPU tensor of the same geometry without memory, also for the fake tensors that torch.compile traces with.
at::Tensor hollow(const at::Tensor& tensor) {
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, at::kCPU), c10::GetCPUAllocator(), true),
      c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return host;
}

// The attention kernel that the CPU would choose, so that results are the CPU's.
int64_t attention_kernel(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    double dropout, bool is_causal, std::optional<double> scale, bool grouped) {
  for (const auto* tensor : {&query, &key, &value}) {
    if (tensor->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      return 0;  // shapes that are not known yet: attention as plain products
    }
  }
  // Straight to the CPU's answer: a mode that traces must not see the hollow tensors.
  return at::_ops::_fused_sdp_choice::redispatch(
      c10::DispatchKeySet(c10::DispatchKey::CPU), hollow(query), hollow(key), hollow(value), mask ? std::optional<at::Tensor>(hollow(*mask)) : std::nullopt, dropout,
      is_causal, scale, grouped);
}

const std::unordered_set<std::string> kOwnKernels = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::copy_", "aten::_local_scalar_dense",
    "aten::set_.source_Storage_storage_offset", "aten::set_.source_Storage", "aten::set_.source_Tensor", "aten::set_",
    "aten::record_stream", "aten::convolution_overrideable", "aten::convolution_backward_overrideable",
    "aten::_fused_sdp_choice", "aten::is_pinned", "aten::_pin_memory", "aten::_copy_from",
    "aten::_copy_from_and_resize"};

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("record_stream", record_stream);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // What the CPU has a kernel of its own for is run by that kernel, not by a decomposition. The same for lists of tensors,
  // whose operations PyTorch would otherwise take apart.
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    if (name.name.rfind("aten::", 0) != 0 || kOwnKernels.count(full)) {
      continue;
    }
    const auto handle = c10::Dispatcher::singleton().findSchema(name);
    if (handle &&
        (handle->hasKernelForDispatchKey(c10::DispatchKey::CPU) || name.name.rfind("aten::_foreach_", 0) == 0)) {
      m.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_twins>());
    }
  }
}

TORCH_LIBRARY_IMPL(_, HPU, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_twins>());
}

// Dropout as Gaudi's bridge has it (`hpu_wrap::dropout`, github.com/HabanaAI/gaudi-pytorch-bridge): a mask of one
// byte per element is saved for backward, where PyTorch's own composition saves noise of the input's dtype.
struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor scaled(const at::Tensor& values, const at::Tensor& mask, double p) {
    return at::mul(values, mask).mul_(1.0f / static_cast<float>(1 - p));  // rounded as the CPU's noise is
  }

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input, double p) {
    const auto mask = at::empty_like(input, input.options().dtype(at::kByte)).bernoulli_(1 - p);
    context->save_for_backward({mask});
    context->saved_data["p"] = p;
    return scaled(input, mask, p);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto mask = context->get_saved_variables()[0];
    return {scaled(gradients[0], mask, context->saved_data["p"].toDouble()), at::Tensor()};
  }
};

at::Tensor dropout(const at::Tensor& input, double p, bool train) {
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (!train || p == 0 || input.sym_numel() == 0) {
    return input;
  }
  return p == 1 ? at::mul(input, 0.0) : Dropout::apply(input, p);
}

TORCH_LIBRARY_IMPL(aten, AutogradHPU, m) {
  m.impl("dropout", dropout);
}

// --------------------------------------------------------------------------------------------------------- collectives

template <class F>
c10::IValue map_tensors(const c10::IValue& value, const F& function) {
  if (value.isTensor()) {
    return function(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const auto& item : value.toListRef()) {
      mapped.push_back(function(item.toTensor()));
    }
    return mapped;
  }
  if (value.isList() && !value.isIntList()) {
    const auto list = value.toList();
    c10::impl::GenericList mapped(list.elementType());
    for (const c10::IValue item : list) {
      mapped.push_back(map_tensors(item, function));
    }
    return mapped;
  }
  return value;
}

// How often each collective ran, and the bytes of the cards' tensors that it was about: those of its larger side.
struct Traffic {
  int64_t calls = 0, bytes = 0;
};
std::mutex traffic_mutex;
std::map<std::string, Traffic> traffic;

int64_t bytes_on_card(const c10::IValue& value) {
  int64_t bytes = 0;
  map_tensors(value, [&](const at::Tensor& tensor) {
    bytes += tensor.defined() && on_card(tensor) ? static_cast<int64_t>(tensor.nbytes()) : 0;
    return tensor;
  });
  return bytes;
}

// A collective ends the graph that is being gathered, as on a card, and then runs on the twins: the process group's backend
// for host memory does the work. It is part of PyTorch's dispatcher, so that torch.compile sees a process group like any other.
void collective(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  TORCH_CHECK(!capturing, "collectives are not supported during hpu graph capturing here");
  graphs.close();
  // Where the output is one tensor, its shape need not be the input's with the ranks as one more dimension.
  const auto& name = handle.schema().name();
  const bool flat = name == "c10d::_allgather_base_" || name == "c10d::_reduce_scatter_base_";
  const auto arguments = handle.schema().arguments().size();
  std::vector<Operand> operands;
  int64_t bytes = 0;
  for (size_t i = stack->size() - arguments; i < stack->size(); ++i) {
    bytes = std::max(bytes, bytes_on_card((*stack)[i]));
    (*stack)[i] = map_tensors((*stack)[i], [&](const at::Tensor& tensor) {
      if (!tensor.defined() || !on_card(tensor)) {
        return tensor;
      }
      const auto host = flat ? twin(tensor).view(-1) : twin(tensor);
      operands.push_back({tensor, host});
      return host;
    });
  }
  {
    const std::lock_guard<std::mutex> lock(traffic_mutex);
    auto& one = traffic[name.substr(6)];
    ++one.calls;
    one.bytes += bytes;
  }
  handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = stack->size() - handle.schema().returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = map_tensors((*stack)[i], [&](const at::Tensor& host) {
      for (const auto& operand : operands) {
        if (operand.host.is_same(host)) {
          return operand.tensor;
        }
      }
      return host;
    });
  }
}

TORCH_LIBRARY_IMPL(c10d, HPU, m) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("c10d::", 0) == 0) {
      m.impl(name.name.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&collective>());
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ autocast

enum class Cast { kNarrow, kWide, kWideUnlessDtype, kWidest };

bool castable(const at::Tensor& tensor) {
  return at::autocast::is_eligible(tensor, kHPU);
}

template <class F>
void replace_tensors(c10::IValue& value, F function) {
  if (value.isTensor()) {
    value = function(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& item : value.toListRef()) {
      list.push_back(function(item.toTensor()));
    }
    value = std::move(list);
  }
}

template <Cast policy>
void autocast(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastHPU);
  const auto& arguments = handle.schema().arguments();
  const auto base = stack->size() - arguments.size();
  auto to = policy == Cast::kNarrow ? at::autocast::get_autocast_dtype(kHPU) : at::kFloat;
  bool cast = true;
  if constexpr (policy == Cast::kWidest) {
    to = at::autocast::get_autocast_dtype(kHPU);
    for (size_t i = 0; i < arguments.size(); ++i) {
      replace_tensors((*stack)[base + i], [&](const at::Tensor& tensor) {
        if (castable(tensor) && tensor.scalar_type() == at::kFloat) {
          to = at::kFloat;
        }
        return tensor;
      });
    }
  }
  if constexpr (policy == Cast::kWideUnlessDtype) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      auto& value = (*stack)[base + i];
      if (arguments[i].name() == "dtype") {
        cast = false;  // the operation converts by itself
        if (value.isNone() && (*stack)[base].isTensor() && castable((*stack)[base].toTensor())) {
          value = c10::IValue(at::kFloat);
        }
      }
    }
  }
  for (size_t i = 0; cast && i < arguments.size(); ++i) {
    replace_tensors((*stack)[base + i], [&](const at::Tensor& tensor) {
      return castable(tensor) ? at::autocast::cached_cast(to, tensor, kHPU) : tensor;
    });
  }
  handle.callBoxed(stack);
}

torch::CppFunction cast_function(Cast policy) {
  switch (policy) {
    case Cast::kNarrow:
      return torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::kNarrow>>();
    case Cast::kWide:
      return torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::kWide>>();
    case Cast::kWideUnlessDtype:
      return torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::kWideUnlessDtype>>();
    default:
      return torch::CppFunction::makeFromBoxedFunction<&autocast<Cast::kWidest>>();
  }
}

using Policies = std::map<std::string, Cast>;  // by full operator name

// "conv2d", or "pow, Tensor_Scalar", as the lists of PyTorch write it.
std::string operator_name(std::string item) {
  const auto comma = item.find(',');
  if (comma == std::string::npos) {
    return item;
  }
  return item.substr(0, comma) + "." + item.substr(item.find_first_not_of(' ', comma + 1));
}

void standard_policies(Policies& policies) {
#define NARROW(...) policies[operator_name(#__VA_ARGS__)] = Cast::kNarrow;
#define WIDE(...) policies[operator_name(#__VA_ARGS__)] = Cast::kWide;
#define WIDE_UNLESS_DTYPE(...) policies[operator_name(#__VA_ARGS__)] = Cast::kWideUnlessDtype;
  AT_FORALL_LOWER_PRECISION_FP(NARROW)
  AT_FORALL_FP32(WIDE)
  AT_FORALL_FP32_SET_OPT_DTYPE(WIDE_UNLESS_DTYPE)
  policies["norm.Scalar"] = policies["norm.ScalarOpt_dim"] = Cast::kWide;
#undef NARROW
#undef WIDE
#undef WIDE_UNLESS_DTYPE
}

// Names in the files of PT_HPU_AUTOCAST_*_OPS_LIST are those of Python methods: they stand for all overloads, and `iadd` for
// the in-place form.
void add_listed(Policies& policies, const std::string& names, Cast policy) {
  static const std::map<std::string, std::string> python = {
      {"iadd", "add_"}, {"isub", "sub_"}, {"imul", "mul_"}, {"idiv", "div_"}, {"itruediv", "div_"}, {"truediv", "div"}};
  std::istringstream lines(names);
  for (std::string name; lines >> name;) {
    if (const auto found = python.find(name); found != python.end()) {
      name = found->second;
    }
    for (const auto& each : c10::Dispatcher::singleton().getAllOpNames()) {
      if (each.name == "aten::" + name && each.overload_name.find("out") == std::string::npos) {
        policies[each.overload_name.empty() ? name : name + "." + each.overload_name] = policy;
      }
    }
  }
}

std::unique_ptr<torch::Library> autocast_kernels;

void refuse_binary_cross_entropy(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK(false, "binary_cross_entropy is unsafe to autocast: use binary_cross_entropy_with_logits");
}

// Lists replace the standard ones; "" keeps the standard list of that kind.
void register_autocast(const std::string& narrow, const std::string& wide) {
  Policies policies;
  standard_policies(policies);
  for (const auto& [names, kinds] :
       {std::pair{narrow, std::vector{Cast::kNarrow}}, std::pair{wide, std::vector{Cast::kWide, Cast::kWideUnlessDtype}}}) {
    for (auto entry = policies.begin(); !names.empty() && entry != policies.end();) {
      entry = std::find(kinds.begin(), kinds.end(), entry->second) != kinds.end() ? policies.erase(entry) : std::next(entry);
    }
  }
  add_listed(policies, narrow, Cast::kNarrow);
  add_listed(policies, wide, Cast::kWide);
#define WIDEST(...) policies.emplace(operator_name(#__VA_ARGS__), Cast::kWidest);
  AT_FORALL_PROMOTE(WIDEST)
#undef WIDEST
  for (const auto* name : {"cat", "stack"}) {
    policies.emplace(name, Cast::kWidest);
  }
  autocast_kernels.reset();
  autocast_kernels = std::make_unique<torch::Library>(
      torch::Library::IMPL, "aten", c10::DispatchKey::AutocastHPU, __FILE__, __LINE__);
  for (const auto& [name, policy] : policies) {
    if (c10::Dispatcher::singleton().findSchema(torch::jit::parseName("aten::" + name))) {
      autocast_kernels->impl(name.c_str(), cast_function(policy));
    }
  }
  autocast_kernels->impl(
      "binary_cross_entropy", torch::CppFunction::makeFromBoxedFunction<&refuse_binary_cross_entropy>());
}

TORCH_LIBRARY_IMPL(_, AutocastHPU, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

// -------------------------------------------------------------------------------------------------- devices and streams

using Clock = std::chrono::steady_clock;
thread_local std::array<c10::StreamId, kMaxCards> current_stream{};
std::atomic<c10::StreamId> next_stream{1};

// Work is done when a call returns, so that streams and events have nothing to order; they keep identity and time.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kHPU;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return c10::Device(kHPU, current_card);
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(
        device.index() < card_count, "hpu:", static_cast<int>(device.index()), " does not exist: there are ", card_count,
        " cards");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) {
      current_card = device.index();
    }
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, with_index(device), current_stream[with_index(device).index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, with_index(device));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, with_index(device), next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto& current = current_stream[stream.device_index()];
    const c10::Stream before(c10::Stream::UNSAFE, stream.device(), current);
    current = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(card_count);
  }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) {
      *event = new Clock::time_point;
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    host_sync("synchronize");
  }
  void synchronizeEvent(void*) const override {
    host_sync("synchronize");
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    host_sync("synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    TORCH_CHECK(first && second, "both events must be recorded before their time is taken");
    return std::chrono::duration<double, std::milli>(
               *static_cast<Clock::time_point*>(second) - *static_cast<Clock::time_point*>(first))
        .count();
  }

 private:
  static c10::Device with_index(c10::Device device) {
    return device.has_index() ? device : c10::Device(kHPU, current_card);
  }
};
C10_REGISTER_GUARD_IMPL(HPU, Guard);
REGISTER_ALLOCATOR(kHPU, &card_allocator);

// PyTorch looks this class up by its name.
struct HPUHooks final : at::HPUHooksInterface {
  explicit HPUHooks(at::HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(card_count);
  }
  void setCurrentDevice(c10::DeviceIndex card) const override {
    Guard().setDevice(c10::Device(kHPU, card));
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_card;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex card) const override {
    const auto before = current_card;
    setCurrentDevice(card);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex card) const override {
    return card < 0 ? current_card : exchangeDevice(card);
  }
  bool isPinnedPtr(const void* data) const override {
    return PinnedAllocator::holds(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
  at::Device getDeviceFromPtr(void*) const override {
    return at::Device(kHPU, current_card);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex card) const override {
    return default_generator(card);
  }
  at::Generator getNewGenerator(c10::DeviceIndex card) const override {
    return at::make_generator<CardGenerator>(card < 0 ? current_card : card);
  }
};

const bool attention_chosen = [] {
  at::native::_fused_sdp_choice_stub.set_hpu_dispatch_ptr(&attention_kernel);
  return true;
}();

// -------------------------------------------------------------------------------------------- what Python calls, with tensors

std::mutex captures_mutex;
std::map<int64_t, std::unique_ptr<Capture>> captures;

int64_t capture_begin() {
  TORCH_CHECK(!capturing, "an hpu graph is being captured already");
  const std::lock_guard<std::mutex> lock(captures_mutex);
  static int64_t next = 0;
  auto& capture = captures[++next];
  capture = std::make_unique<Capture>();
  graphs.open_region();
  capturing = capture.get();
  return next;
}

// A capture runs nothing on a card: what it wrote is put back.
void capture_end() {
  TORCH_CHECK(capturing, "no hpu graph is being captured");
  auto* capture = std::exchange(capturing, nullptr);
  for (auto entry = capture->before.rbegin(); entry != capture->before.rend(); ++entry) {
    entry->first.copy_(entry->second);
  }
  capture->before.clear();
  graphs.close_region();
}

void replay(int64_t number) {
  const Capture* capture;
  {
    const std::lock_guard<std::mutex> lock(captures_mutex);
    capture = captures.at(number).get();
  }
  graphs.close();
  const at::NoGradGuard no_grad;
  for (const auto& operation : capture->operations) {
    operation();
  }
}

void drop(int64_t number) {
  const std::lock_guard<std::mutex> lock(captures_mutex);
  captures.erase(number);
}

at::Tensor host_view(const at::Tensor& tensor) {
  return twin(tensor);
}

at::Generator generator(int64_t card) {
  return default_generator(static_cast<c10::DeviceIndex>(card));
}

TORCH_LIBRARY(gaudi_simulator, m) {
  m.def("host_view", host_view);
  m.def("generator", generator);
  m.def("capture_begin", capture_begin);
  m.def("capture_end", capture_end);
  m.def("replay", replay);
  m.def("drop", drop);
  m.def("register_autocast", register_autocast);
}

std::string escape(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      escaped += '\\';
    }
    escaped += c;
  }
  return escaped;
}

// Without one, DistributedDataParallel warns in each rank that it cannot time its steps.
class StepTimer : public c10d::Timer {
 public:
  explicit StepTimer(c10::Device /*device*/) {}

  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimestamp(start), to = getTimestamp(end);
    return from && to && *to >= *from ? std::optional<int64_t>(*to - *from) : std::nullopt;
  }
};

} // namespace

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kHPU, StepTimer)
} // namespace c10d

namespace at {
using ::HPUHooks;
REGISTER_HPU_HOOKS(HPUHooks)
} // namespace at

extern "C" {

int gaudi_current_card() {
  return current_card;
}

void gaudi_set_card(int card) {
  current_card = static_cast<c10::DeviceIndex>(card);
}

int64_t gaudi_memory(int card, int which) {
  const Card& figures = cards[card];
  const std::atomic<int64_t>* fields[] = {
      &figures.in_use, &figures.peak, &figures.allocations, &figures.frees, &figures.largest, &figures.total};
  return which < 0 ? memory_limit() : fields[which]->load();
}

void gaudi_reset_peak(int card) {
  cards[card].peak = cards[card].in_use.load();
}

void gaudi_mark_step() {
  graphs.close();
}

void gaudi_open_region() {
  graphs.open_region();
}

void gaudi_close_region() {
  graphs.close_region();
}

void gaudi_synchronize() {
  graphs.host_sync("synchronize");
}

int64_t gaudi_compilations() {
  return graphs.compilations();
}

int64_t gaudi_host_syncs() {
  return graphs.host_syncs();
}

// JSON: one object for each compilation from the given one on. The text lives until this thread asks again.
const char* gaudi_compilation_history(int64_t from) {
  thread_local std::string text;
  std::ostringstream out;
  const auto history = graphs.history();
  out << '[';
  for (size_t i = from; i < history.size(); ++i) {
    out << (i > static_cast<size_t>(from) ? ", " : "") << "{\"operations\": " << history[i].operations
        << ", \"position\": " << history[i].position << ", \"first\": \"" << escape(history[i].first) << "\"}";
  }
  out << ']';
  text = out.str();
  return text.c_str();
}

// JSON: calls and bytes of each collective.
const char* gaudi_collectives() {
  thread_local std::string text;
  std::ostringstream out;
  out << '{';
  const std::lock_guard<std::mutex> lock(traffic_mutex);
  for (const auto& [name, one] : traffic) {
    out << (out.tellp() > 1 ? ", " : "") << '"' << name << "\": [" << one.calls << ", " << one.bytes << ']';
  }
  out << '}';
  text = out.str();
  return text.c_str();
}

// JSON: how often the host waited, by operation.
const char* gaudi_host_sync_operations() {
  thread_local std::string text;
  std::ostringstream out;
  out << '{';
  for (const auto& [name, count] : graphs.syncs()) {
    out << (out.tellp() > 1 ? ", " : "") << '"' << escape(name) << "\": " << count;
  }
  out << '}';
  text = out.str();
  return text.c_str();
}

} // extern "C"
