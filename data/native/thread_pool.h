// Threads that share a batch image by image, as images differ in cost. The caller works along.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace loader {

class ThreadPool {
public:
    explicit ThreadPool(int workers) {
        try {
            for (int i = 1; i < workers; i++) threads_.emplace_back([this] { serve(); });
        } catch (const std::system_error &) {  // the process may have no more threads; fewer do the same work
        }
    }

    ~ThreadPool() {
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

    // Calls task(0) ... task(count - 1), each once, in any order, and returns when all have returned. Callers in several
    // threads take turns: two loaders' iterators may share a pool.
    // After a fork the child has no helpers: the caller then does everything.
    void run(int64_t count, const std::function<void(int64_t)> &task) {
        const std::lock_guard<std::mutex> turn(turn_);
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            task_ = &task;
            count_ = count;
            next_ = 0;
            batch_++;
        }
        wake_.notify_all();
        work(task, count);
        std::unique_lock<std::mutex> lock(mutex_);
        task_ = nullptr;  // a thread that wakes only now stays out
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void work(const std::function<void(int64_t)> &task, int64_t count) {
        for (int64_t i; (i = next_.fetch_add(1)) < count;) task(i);
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (int64_t seen = 0;;) {
            wake_.wait(lock, [&] { return stop_ || (task_ && batch_ != seen); });
            if (stop_) return;
            seen = batch_;
            busy_++;
            const auto &task = *task_;
            const int64_t count = count_;
            lock.unlock();
            work(task, count);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;  // turn_: held through a run
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    const std::function<void(int64_t)> *task_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0, batch_ = 0;
    int busy_ = 0;
    bool stop_ = false;
};

}  // namespace loader
