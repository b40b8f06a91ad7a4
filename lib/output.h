// The output directory of a run, signals, and what a process does first.
//
// Included once, by olmoe.cu, after host_sum.
#pragma once
#include <atomic>
#include <csignal>
#include <filesystem>
#include <thread>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

// Standard output goes through output_write, which keeps why it failed: when a command ends and asks, errno is another
// call's. Only rank 0 prints.
static int output_error = 0;

ssize_t output_write(void*, const char* bytes, size_t n) {
    size_t written = ranks.rank > 0 ? n : 0;
    while (written < n) {
        ssize_t more = write(STDOUT_FILENO, bytes + written, n - written);
        if (more < 0 && errno == EINTR) continue;
        if (more < 0 && output_error == 0) output_error = errno;
        if (more < 0) break;
        written += (size_t)more;
    }
    return (ssize_t)written;
}

// Ends the program if something that it printed was not written.
void print_check() {
    fflush(stdout);
    if (output_error != 0) die("cannot write to standard output: %s", strerror(output_error));
}

// Before anything is opened. Where standard input, output or error is closed, a file would take its number, and the
// messages.
void process_prepare() {
    for (int fd : {0, 1, 2}) if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) exit(1);
    cookie_io_functions_t functions = {nullptr, output_write, nullptr, nullptr};
    if (FILE* f = fopencookie(nullptr, "w", functions)) stdout = f;
    setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
    signal(SIGXFSZ, SIG_IGN);               // a limit on file sizes is an error of the write, not the program's end
    signal(SIGBUS, [](int) {
        const char line[] = "olmoe: a file became shorter while it was read, or shared memory is full\n";
        (void)!write(2, line, sizeof line - 1);
        _exit(1);
    });
}

// ------------------------------------------------------------------------------------------------
// Ctrl-C and its like. No handler runs on a thread that computes: oneDNN's sgemm has its stack pointer in the heap, and
// a signal's frame would overwrite what is there (oneDNN issue 4845). All threads block the signals and one waits for
// them, so this comes before any other thread is started.

static std::atomic<bool> stopping_saves = false;    // there are steps to finish: else a signal ends the program
static std::atomic<bool> stop_requested = false;

void signals_watch() {
    signal(SIGPIPE, SIG_IGN);               // of a screen that went away (| tee, | head): training goes on and saves
    sigset_t signals;
    struct sigaction hangup;
    sigaction(SIGHUP, nullptr, &hangup);
    sigemptyset(&signals);
    // mpirun hands SIGUSR1 to its ranks without ending them (scripts/launch_node.sh)
    for (int s : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&signals, s);
    // a closed terminal, unless nohup said that it doesn't matter
    if (hangup.sa_handler != SIG_IGN) sigaddset(&signals, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    std::thread([signals] {
        for (int s; sigwait(&signals, &s) == 0; ) {
            // a second Ctrl-C ends the program at once; launchers send SIGTERM more than once
            if (!stopping_saves || (s == SIGINT && stop_requested)) {
                signal(s, SIG_DFL);
                pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
                raise(s);
            }
            stop_requested = true;
        }
    }).detach();
}

// The ranks and their groups, before files are opened: an error that all of them find is then one line.
void ranks_open(const std::string& rendezvous, double timeout, int64_t ep, bool zero_1) {
    signals_watch();                        // before any other thread starts
    ranks = ranks_start(rendezvous, NCCL_BY_MPI);
    ranks_watch(timeout);
    if (ranks.size % ep != 0) die("%d ranks can't be divided into groups of --ep %ld", ranks.size, ep);
    layout_set(ranks.rank, ranks.size, (int)ep, zero_1);
}

// ------------------------------------------------------------------------------------------------
// The output directory

void output_make(const std::string& out) {
    bool made = mkdir(out.c_str(), 0777) == 0 || errno == EEXIST;
    if (!made) die("cannot make the directory %s: %s", out.c_str(), strerror(errno));
}

static int output_folder = -1;              // the directory itself, whatever its name becomes

// Held until the process ends, by rank 0 with a lock; where the file system has no locks, without
void output_lock(const std::string& out) {
    output_folder = open(out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool lock = world.rank == 0 && output_folder >= 0;
    if (lock && flock(output_folder, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        die("another run is writing into %s; wait for its end, or choose another --out", out.c_str());
    if (output_folder < 0) output_folder = open(out.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);     // may not be read
}

// Before a save: the name that the directory has now. Where it has none, the run ends: its log is lost, and another
// directory of that name is not its.
void output_follow(std::string* out) {
    struct stat held, named;
    std::error_code ignored;
    if (output_folder < 0 || fstat(output_folder, &held) != 0) return;
    auto is_it = [&](const std::string& path) {
        return stat(path.c_str(), &named) == 0 && named.st_dev == held.st_dev && named.st_ino == held.st_ino;
    };
    const std::string now =
        std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(output_folder), ignored).string();
    // some network file systems number a directory anew now and then
    if (is_it(*out) || now == std::filesystem::canonical(*out, ignored).string()) return;
    if (!is_it(now))
        die("%s was removed while the run wrote into it; it ends, and this step is not saved", out->c_str());
    printf("%s was renamed, and the run goes on in %s\n", out->c_str(), now.c_str());
    *out = now;
}

// It can be written, and all ranks see the same one: they write checkpoints together.
void output_check(const std::string& out) {
    if (access(out.c_str(), W_OK) != 0) die("cannot write into %s: %s", out.c_str(), strerror(errno));
    if (world.size == 1) return;
    std::string mark = out + "/.shared";
    FILE* f = world.rank == 0 ? fopen(mark.c_str(), "w") : nullptr;
    if (f) fclose(f);
    host_sum(0.0);
    bool seen = access(mark.c_str(), F_OK) == 0;
    double blind = host_sum(seen ? 0 : 1);
    if (world.rank == 0) unlink(mark.c_str());
    if (blind > 0)
        die("--out %s: %.0f of %d ranks do not see in it what rank 0 writes; "
            "it has to be on a file system that all machines share", out.c_str(), blind, world.size);
}

// The file that links of this name lead to. A pipe or a deleted file has no name of its own.
std::string file_behind(const std::string& path) {
    std::error_code none;
    const std::string file = std::filesystem::canonical(path, none).string();
    return none ? path : file;
}

// A text under a name: all of it, or what was there before. What standard output goes to gets the text there; another
// device is written to.
void file_replace(const std::string& path, const std::string& contents) {
    struct stat info, screen;
    const bool there = stat(path.c_str(), &info) == 0, device = there && !S_ISREG(info.st_mode);
    if (there && fstat(STDOUT_FILENO, &screen) == 0 && info.st_dev == screen.st_dev && info.st_ino == screen.st_ino) {
        fwrite(contents.data(), 1, contents.size(), stdout);
        print_check();
        return;
    }
    const std::string file = file_behind(path), to = device ? path : file + ".tmp";
    FILE* f = fopen(to.c_str(), "w");
    bool written = f && fwrite(contents.data(), 1, contents.size(), f) == contents.size();
    if (f) written = fclose(f) == 0 && written;
    if (!device && written) written = rename(to.c_str(), file.c_str()) == 0;
    if (written) return;
    const int error = errno;
    if (!device && f) unlink(to.c_str());
    die("cannot write %s: %s", path.c_str(), strerror(error));
}

// The files of an option
struct FilesOf { const char* option; std::vector<std::string> paths; };

// Ends the program where a file to write, "" for none, is also another one to write, or one to read: by its place, not
// by how it is spelled.
void outputs_check(const std::vector<FilesOf>& outputs, const std::vector<FilesOf>& inputs) {
    std::error_code none;
    auto same = [&](const std::string& a, const std::string& b) {
        auto place = [&](const std::string& path) {
            return std::filesystem::weakly_canonical(std::filesystem::absolute(path, none), none);
        };
        return !a.empty() && !b.empty() && place(a) == place(b);
    };
    for (const FilesOf& out : outputs) {
        const std::string& path = out.paths[0];
        for (const FilesOf& other : outputs)
            if (&other > &out && same(path, other.paths[0]))
                die("--%s and --%s are the same file; name two", out.option, other.option);
        for (const FilesOf& in : inputs)
            for (const std::string& read : in.paths)
                if (same(path, read))
                    die("--%s %s is a file of --%s; name another", out.option, path.c_str(), in.option);
    }
}

// Ends the program where file_replace could not write, before much work is done for it.
void file_check_writable(const std::string& path) {
    struct stat info;
    const bool there = stat(path.c_str(), &info) == 0;
    if (there && S_ISDIR(info.st_mode)) die("cannot write %s: it is a directory", path.c_str());
    const bool device = there && !S_ISREG(info.st_mode);
    const std::string temporary = file_behind(path) + ".tmp";
    FILE* f = device ? nullptr : fopen(temporary.c_str(), "w");
    if (device ? access(path.c_str(), W_OK) != 0 : !f) die("cannot write %s: %s", path.c_str(), strerror(errno));
    if (f) { fclose(f); unlink(temporary.c_str()); }
}

// Drops the lines of steps after `step` from a log, so that a resumed run's log reads as if it had never stopped (but
// for the expert balance without --val, which counts from where the run went on).
void log_truncate(const std::string& path, int64_t step) {
    std::string old, kept;
    if (!file_contents(&old, path)) return;
    for (size_t begin = 0, end; (end = old.find('\n', begin)) != std::string::npos; begin = end + 1) {
        std::string line = old.substr(begin, end + 1 - begin);
        if (line.find("{\"step\":") == 0 && atoll(line.c_str() + 8) > step) continue;
        kept += line;
    }
    if (kept != old) file_replace(path, kept);
}
