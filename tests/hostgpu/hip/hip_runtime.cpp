// Runs the blocks of a launch one after another, and the threads of a block as fibres: each on a stack of its own
// until it returns or waits. A thread that waits hands over to the next that can run; the last to arrive at a
// meeting makes all of its threads ready again. One that returns leaves its stack to the next to start, so that a
// kernel without barriers never switches stacks.
//
//   ready    a ring of threads, at first all of them, none started
//   meet()   from a thread: wait, and switch to whoever is next in `ready`
//   work()   the loop a fibre lives in: take a thread that has not started, run it
#include "hip_runtime.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#if defined(__x86_64__) && !defined(HOSTGPU_UCONTEXT)
#define HOSTGPU_X86_64
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim, gridDim;

namespace hostgpu {

namespace {

constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxWaves = kMaxThreads / kWave;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "hostgpu: %s\n", message.c_str());
  std::abort();
}

// ------------------------------------------------------------------------------------------ fibres

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = size_t(1) << 18;  // AddressSanitizer widens frames
#else
constexpr size_t kStackBytes = size_t(1) << 16;
#endif

struct Fibre {
#if defined(HOSTGPU_X86_64)
  void* stack_pointer;  // while it does not run
#else
  ucontext_t context;
#endif
  Fibre* next_free;
  const void* stack;  // lowest address: with the rest, for AddressSanitizer
  size_t stack_bytes;
  void* fake_stack;
};

// All of this belongs to the OS thread whose block runs; see Turn.
Fibre launcher;  // the OS thread itself
Fibre* running = &launcher;
Fibre* previous;  // ran before `running`
Fibre* free_fibres;

[[noreturn]] void work();

#if defined(HOSTGPU_X86_64)
// Leaves the registers that a function must preserve on this stack and its pointer in *from (rdi); goes on with
// stack `to` (rsi). swapcontext does the same, and asks the system for the signal mask twice.
[[gnu::naked, gnu::noinline]] void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret");
}
#endif

void switch_to(Fibre& next) {
  if (&next == running) return;
  Fibre& self = *running;
  previous = &self;
  running = &next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.fake_stack, next.stack, next.stack_bytes);
#endif
#if defined(HOSTGPU_X86_64)
  switch_stack(&self.stack_pointer, next.stack_pointer);
#else
  swapcontext(&self.context, &next.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &previous->stack, &previous->stack_bytes);
#endif
}

void enter_fibre() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &previous->stack, &previous->stack_bytes);
#endif
  work();
}

// Fibres are kept for good: the next block needs them again.
Fibre& make_fibre() {
  static unsigned made = 0;
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) fail("no memory for the stack of a thread");
  // Stacks that begin at the same place of their pages compete for the same few lines of the cache.
  const size_t colour = made++ % 32 * 128;
  char* stack = static_cast<char*>(memory) + guard;
  const size_t bytes = (kStackBytes - colour - sizeof(Fibre)) / 64 * 64;
  Fibre* fibre = new (stack + bytes) Fibre{};
  fibre->stack = stack;
  fibre->stack_bytes = bytes;
#if defined(HOSTGPU_X86_64)
  // As switch_stack() leaves a stack: six registers and the address to go on at. Above them, 8 bytes off a
  // multiple of 16 as in any call, the return address of enter_fibre(): zero like all fresh memory, which ends
  // backtraces.
  void** top = reinterpret_cast<void**>(stack + bytes);
  top[-2] = reinterpret_cast<void*>(&enter_fibre);
  fibre->stack_pointer = top - 8;
#else
  getcontext(&fibre->context);
  fibre->context.uc_stack.ss_sp = stack;
  fibre->context.uc_stack.ss_size = bytes;
  makecontext(&fibre->context, enter_fibre, 0);
#endif
  return *fibre;
}

// --------------------------------------------------------------------------------------- one block

// Threads that wait for each other: those of a block, or those of a wave.
struct Meeting {
  const unsigned* threads;  // num_threads of them, in the order they run in
  unsigned num_threads;
  unsigned members;  // have not returned
  unsigned arrived;
  unsigned held;   // meetings so far
  unsigned first;  // thread to arrive, where it waits, and what it calls there
  Site site;
  const char* action;

  void reset(const unsigned* of, unsigned size) { *this = {of, size, size, 0, 0, 0, {}, nullptr}; }
};

struct Wave : Meeting {
  Exchange exchange[2];  // by turns: a lane may write to the next one while another still reads this one
};

struct Thread {
  Fibre* fibre;       // null until it starts
  const Meeting* at;  // where it waits
};

struct Launch {
  dim3 grid, block;
  void (*call)(const void*);
  const void* arguments;
  // The threads of a block in the order they run in, and the same wave by wave.
  std::vector<unsigned> threads, threads_by_wave;
};

// Of the block that runs.
const Launch* launched;
Meeting barrier;
Wave waves[kMaxWaves];
Thread threads[kMaxThreads];
unsigned ready[kMaxThreads];  // a ring; no thread is in it twice
unsigned first_ready, last_ready;

std::string describe(const char* action, const Site& site) {
  return std::string(action) + " in " + site.function_name() + " (" + site.file_name() + ":" +
         std::to_string(site.line()) + ")";
}

[[noreturn]] void fail_stuck() {
  std::string message = "block " + std::to_string(blockIdx.x) + " is stuck:";
  const auto add = [&](const Meeting& meeting, const char* whole) {
    if (meeting.arrived == 0) return;
    message += "\n  thread " + std::to_string(meeting.first) + " waits at " +
               describe(meeting.action, meeting.site) + ", where " + std::to_string(meeting.arrived) + " of the " +
               std::to_string(meeting.members) + " running threads of its " + whole + " are";
  };
  add(barrier, "block");
  for (unsigned w = 0; w * kWave < blockDim.x; ++w) add(waves[w], "wave");
  fail(message);
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// The fibre of the next thread that can run; if that has not started, a free one, which then starts it.
Fibre& next_fibre() {
  if (first_ready == last_ready) {
    if (barrier.members > 0) fail_stuck();
    return launcher;
  }
  if (Fibre* fibre = threads[ready[first_ready % kMaxThreads]].fibre) {
    ++first_ready;
    return *fibre;
  }
  return free_fibres == nullptr ? make_fibre() : *std::exchange(free_fibres, free_fibres->next_free);
}

void release_if_complete(Meeting& meeting) {
  if (meeting.arrived == 0 || meeting.arrived < meeting.members) return;
  for (unsigned k = 0; k < meeting.num_threads; ++k) {
    const unsigned t = meeting.threads[k];
    if (threads[t].at != &meeting) continue;  // has returned
    threads[t].at = nullptr;
    ready[last_ready++ % kMaxThreads] = t;
  }
  meeting.arrived = 0;
  ++meeting.held;
}

void meet(Meeting& meeting, const char* action, const Site& site) {
  const unsigned self = threadIdx.x;
  if (meeting.arrived++ == 0) {
    meeting.first = self;
    meeting.site = site;
    meeting.action = action;
  } else if (!same(meeting.site, site)) {
    fail("block " + std::to_string(blockIdx.x) + ": thread " + std::to_string(self) + " is at " +
         describe(action, site) + ", while thread " + std::to_string(meeting.first) + " waits for it at " +
         describe(meeting.action, meeting.site));
  }
  threads[self].at = &meeting;
  release_if_complete(meeting);
  switch_to(next_fibre());
  threadIdx.x = self;
}

// Whoever switches to a free fibre does so for a thread that has not started and is the next in `ready`.
void work() {
  for (;;) {
    const unsigned self = ready[first_ready++ % kMaxThreads];
    threads[self].fibre = running;
    threadIdx.x = self;
    launched->call(launched->arguments);
    for (Meeting* meeting : {&barrier, static_cast<Meeting*>(&waves[self / kWave])}) {
      --meeting->members;
      release_if_complete(*meeting);
    }
    running->next_free = std::exchange(free_fibres, running);
    switch_to(next_fibre());
  }
}

// The __shared__ arrays of this library, from its symbol table.
std::vector<std::span<char>> find_shared_arrays() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&find_shared_arrays), &self) == 0) fail("dladdr does not know this library");
  std::ifstream file(self.dli_fname, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < sizeof(ElfW(Ehdr))) fail(std::string("cannot read ") + self.dli_fname);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  const auto* table = std::find_if(sections, sections + header->e_shnum,
                                   [](const auto& section) { return section.sh_type == SHT_SYMTAB; });
  if (table == sections + header->e_shnum) fail("no symbols in this library: link it without -s");
  const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + table->sh_offset);
  const char* names = bytes.data() + sections[table->sh_link].sh_offset;
  char* base = header->e_type == ET_DYN ? static_cast<char*>(self.dli_fbase) : nullptr;
  std::vector<std::span<char>> arrays;
  for (const auto* symbol = symbols; symbol < symbols + table->sh_size / sizeof(*symbols); ++symbol)
    if (ELF64_ST_TYPE(symbol->st_info) == STT_OBJECT && std::strstr(names + symbol->st_name, "B14hostgpu_shared"))
      arrays.emplace_back(base + symbol->st_value, symbol->st_size);
  return arrays;
}

void run_block(const Launch& launch, unsigned block) {
  static const std::vector<std::span<char>> shared_arrays = find_shared_arrays();
  for (const auto& array : shared_arrays) std::memset(array.data(), 0xFF, array.size());
  const unsigned size = launch.block.x;
  launched = &launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  blockIdx.x = block;
  barrier.reset(launch.threads.data(), size);
  for (unsigned t = 0; t < size; t += kWave)
    waves[t / kWave].reset(launch.threads_by_wave.data() + t, std::min(size - t, unsigned(kWave)));
  std::fill_n(threads, size, Thread{});
  std::copy(launch.threads.begin(), launch.threads.end(), ready);
  first_ready = 0;
  last_ready = size;
  switch_to(next_fibre());
}

// -------------------------------------------------------------------------------------- the launch

// The device, for the time of one block. First come, first served, so that launches at the same time alternate.
class Turn {
 public:
  Turn() {
    for (unsigned now; (now = serving.load()) != ticket;) serving.wait(now);
  }
  ~Turn() {
    serving.store(ticket + 1);
    serving.notify_all();
  }

 private:
  static inline std::atomic<unsigned> tickets = 0, serving = 0;
  const unsigned ticket = tickets++;
};

// HOSTGPU_ORDER.
struct Order {
  bool reverse = false, seeded = false;
  unsigned long seed = 0;

  Order() {
    const char* text = std::getenv("HOSTGPU_ORDER");
    const std::string wanted = text == nullptr ? "forward" : text;
    reverse = wanted == "reverse";
    seeded = !reverse && wanted != "forward";
    char* end = nullptr;
    if (seeded) seed = std::strtoul(wanted.c_str(), &end, 10);
    if (seeded && (wanted.empty() || *end != 0))
      fail("HOSTGPU_ORDER must be forward, reverse or a seed; got `" + wanted + "`");
  }

  // 0 .. size - 1. With a seed, it differs from one `stream` to the next.
  std::vector<unsigned> operator()(unsigned size, unsigned stream) const {
    std::vector<unsigned> order(size);
    std::iota(order.begin(), order.end(), 0u);
    if (reverse) std::reverse(order.begin(), order.end());
    std::minstd_rand random(static_cast<unsigned>(seed * 1000003 + stream));
    if (seeded) std::shuffle(order.begin(), order.end(), random);
    return order;
  }
};

thread_local hipError_t last_error = hipSuccess;

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* arguments) {
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || shared_bytes != 0)
    fail("only one-dimensional launches without dynamic shared memory");
  if (grid.x == 0 || block.x == 0 || block.x > kMaxThreads || grid.x > INT32_MAX ||
      uint64_t(grid.x) * block.x > static_cast<uint64_t>(most_threads())) {
    last_error = hipErrorInvalidConfiguration;
    return;
  }
  const Order order;
  Launch launch{grid, block, call, arguments, {}, {}};
  for (unsigned b : order(grid.x, 0)) {
    if (launch.threads.empty() || order.seeded) {
      launch.threads = order(block.x, b + 1);
      launch.threads_by_wave.resize(block.x);
      unsigned lanes[kMaxWaves] = {};
      for (unsigned t : launch.threads) launch.threads_by_wave[t / kWave * kWave + lanes[t / kWave]++] = t;
    }
    const Turn turn;
    run_block(launch, b);
  }
}

const Exchange& exchange(uint64_t value, const char* action, const Site& site) {
  Wave& wave = waves[threadIdx.x / kWave];
  const unsigned lane = threadIdx.x % kWave;
  Exchange& now = wave.exchange[wave.held % 2];
  if (wave.arrived == 0) now.present = now.votes = 0;
  now.present |= uint64_t(1) << lane;
  now.votes |= uint64_t(value != 0) << lane;
  now.value[lane] = value;
  meet(wave, action, site);
  return now;
}

// AMD counts the threads of a launch in 32 bits.
int64_t most_threads() {
  const char* text = std::getenv("HOSTGPU_MOST_THREADS");
  return text == nullptr ? int64_t(UINT32_MAX) : std::strtoll(text, nullptr, 10);
}

bool fails(const char* what) {
  const char* text = std::getenv("HOSTGPU_FAULT");
  const std::string faults = text == nullptr ? "" : text;
  const size_t end = std::min(faults.find(','), faults.size());
  if (faults.empty() || faults.substr(0, end) != what) return false;
  setenv("HOSTGPU_FAULT", end == faults.size() ? "" : faults.c_str() + end + 1, 1);
  return true;
}

int group(int width, const Site& site) {
  if (width < 1 || width > kWave || (width & (width - 1)) != 0)
    fail(describe("shuffle", site) + " over a width of " + std::to_string(width));
  return static_cast<int>(threadIdx.x) % kWave & ~(width - 1);
}

}  // namespace hostgpu

void __syncthreads(hostgpu::Site site) { hostgpu::meet(hostgpu::barrier, "__syncthreads", site); }

hipError_t hipGetLastError() {
  if (hostgpu::fails("earlier")) hostgpu::last_error = hipErrorInvalidValue;
  if (hostgpu::fails("busy")) hostgpu::last_error = hipErrorNotReady;
  return std::exchange(hostgpu::last_error, hipSuccess);
}

const char* hipGetErrorString(hipError_t error) {
  if (error == hipSuccess) return "no error";
  if (error == hipErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == hipErrorOutOfMemory) return "out of memory";
  if (error == hipErrorNotReady) return "not ready";
  return "invalid argument";
}

hipError_t hipHostMalloc(void** to, size_t bytes, unsigned /*flags*/) {
  *to = std::malloc(bytes);
  if (*to == nullptr) return hipErrorOutOfMemory;
  std::memset(*to, 0xFF, bytes);
  return hipSuccess;
}

hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  *free = page * static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES));
  *total = page * static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
  return hipSuccess;
}
