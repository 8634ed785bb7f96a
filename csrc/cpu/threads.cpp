#include "cpu/threads.h"

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace resm::cpu {
namespace {

// Waking a thread that has blocked takes some 50 microseconds: threads poll a little before they block, for the end of
// others' last tasks or the next loop of the same call. Workers that polled for longer would be felt after the call.
constexpr std::chrono::microseconds kPolling{100};

template <class Ready>
void poll(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kPolling;
  while (!ready() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

// One call of share_out; lies on its caller's stack.
struct Job {
  const std::function<void()>& share;
  int vacancies;                // threads that may still join
  std::atomic<int> running{0};  // threads that have joined and not yet left
  std::fenv_t floating_point{};
  std::exception_ptr failure{};
  std::condition_variable left{};
};

class Pool {
 public:
  void run(Job& job) {
    const int vacancies = job.vacancies;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < vacancies; ++workers_) start();
      jobs_.push_back(&job);
      ++queue_length_;
    }
    for (int i = 0; i < vacancies; ++i) queued_.notify_one();
    perform(job);
    std::unique_lock<std::mutex> lock(mutex_);
    close(job);
    if (job.running != 0) {
      lock.unlock();
      poll([&] { return job.running == 0; });
      lock.lock();
    }
    job.left.wait(lock, [&] { return job.running == 0; });
  }

 private:
  void start() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error& error) {
      throw std::runtime_error("resm_kernels: cannot start thread " + std::to_string(workers_ + 2) + ": " +
                               error.what() + "; ask for fewer threads");
    }
  }

  // A worker's life. It ends with the process.
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (jobs_.empty()) {
        lock.unlock();
        poll([&] { return queue_length_ != 0; });
        lock.lock();
      }
      queued_.wait(lock, [&] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      ++job.running;
      if (--job.vacancies == 0) close(job);
      lock.unlock();
      std::fesetenv(&job.floating_point);
      perform(job);
      lock.lock();
      // Under the lock: without it the job could be gone before it is told.
      if (--job.running == 0) job.left.notify_one();
    }
  }

  void perform(Job& job) {
    try {
      job.share();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!job.failure) job.failure = std::current_exception();
    }
  }

  void close(Job& job) {
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    queue_length_ = jobs_.size();
  }

  std::mutex mutex_;
  std::condition_variable queued_;
  std::vector<Job*> jobs_;  // that threads may join, the oldest first
  std::atomic<size_t> queue_length_{0};
  int workers_ = 0;
};

// Never deleted: at exit its workers may still wait on it.
std::atomic<Pool*> current{nullptr};

// A forked process has none of the workers, and nobody to release a lock that one of them held: it begins a new pool.
#if defined(_WIN32)
const int fork_error = 0;
#else
const int fork_error = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
#endif

Pool& pool() {
  if (fork_error != 0) throw std::system_error(fork_error, std::generic_category(), "resm_kernels: pthread_atfork");
  Pool* existing = current.load();
  if (existing == nullptr) {
    auto fresh = std::make_unique<Pool>();
    // Where another thread was quicker, `existing` becomes its pool.
    if (current.compare_exchange_strong(existing, fresh.get())) existing = fresh.release();
  }
  return *existing;
}

}  // namespace

void share_out(int others, const std::function<void()>& share) {
  Job job{share, others};
  // Flushing of subnormals is set thread by thread (torch.set_flush_denormal): all that take part do as the caller.
  std::fegetenv(&job.floating_point);
  pool().run(job);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace resm::cpu
