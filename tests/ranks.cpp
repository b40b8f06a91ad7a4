// Lets test_ranks.py drive ranks.h: a training of nothing but collectives, in which one rank does something at a given
// step.
//
//   ranks [name=value ...]
//   rendezvous=X mpi_only=1 patience=S      how to start
//   timeout=S                               the watch's; without it, no watch
//   board=FILE                              shared by the ranks of this machine: the collectives, where there is no MPI
//   steps=N at=K who=R,... act=ACT          these ranks do ACT before their collective K (N: before they leave), after
//                                           heartbeats had time to report K-1. library: a library has an error
//   late=S                                  begins S seconds late
//   word=N                                  what rank 0 broadcasts (123)
//
// Prints a line at the start, "rank 0 of 2, local 0 of 2, pid 17, by mpirun, heard 123", and "done" at the end.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <sys/mman.h>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

#include "../lib/ranks.h"
static Ranks ranks;

void die(const char* format, ...) {
    fflush(stdout);
    if (ranks.rank > 0) sleep(1);
    char text[2048];
    int n = snprintf(text, sizeof text, ranks.rank > 0 ? "olmoe: rank %d: " : "olmoe: ", ranks.rank);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + n, sizeof text - (size_t)n, format, arguments);
    va_end(arguments);
    fprintf(stderr, "%s\n", text);         // at once, because mpirun mixes the lines of several
    exit(1);
}

static void rest(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// Waits until all ranks are here. board (size): the number of collectives in which each rank has arrived.
static void all_reduce(std::atomic<int>* board) {
    if (!board) {
        int one = 1, all = 0;
        MPI_Allreduce(&one, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
        return;
    }
    int here = ++board[ranks.rank];
    for (int r = 0; r < ranks.size; r++) while (board[r] < here) rest(0.001);
}

int main(int argc, char** argv) {
    std::map<std::string, std::string> given;
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i];
        given[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    }
    auto number = [&](const char* name, double otherwise) {
        return given.count(name) ? atof(given[name].c_str()) : otherwise;
    };
    signal(SIGTERM, SIG_IGN);               // a training stops and saves; mpirun sends it at every failure
    if (number("late", 0) > 0) rest(number("late", 0));
    ranks_patience = number("patience", 20);
    ranks = ranks_start(given["rendezvous"], number("mpi_only", 0) != 0);
    double timeout = number("timeout", -1);
    std::vector<int> heard(100000, ranks.rank == 0 ? (int)number("word", 123) : 0);
    ranks_broadcast(heard.data(), heard.size() * sizeof(int));
    if (timeout >= 0) ranks_watch(timeout);
    ranks_broadcast(&heard[0], sizeof heard[0]);
    bool same = std::all_of(heard.begin(), heard.end(), [&](int x) { return x == heard[0]; });
    printf("rank %d of %d, local %d of %d, pid %d, by %s, heard %d\n", ranks.rank, ranks.size, ranks.local_rank,
           ranks.local_size, (int)getpid(), ranks.started_by.c_str(), same ? heard[0] : -1);
    fflush(stdout);

    std::atomic<int>* board = nullptr;
    if (given.count("board")) {
        int fd = open(given["board"].c_str(), O_RDWR);
        board = (std::atomic<int>*)mmap(nullptr, ranks.size * sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (fd < 0 || board == MAP_FAILED) die("no board");
    }
    int steps = (int)number("steps", 0), at = (int)number("at", -1);
    const std::string act = given["act"];
    bool chosen = ("," + given["who"] + ",").find("," + std::to_string(ranks.rank) + ",") != std::string::npos;
    for (int step = 0; step <= steps; step++) {
        if (step == at && timeout > 0) rest(std::min(1.0, timeout / 10) * 2.5);
        if (step == at && chosen) {
            rest(0.3);                      // the others begin their collective
            if (act == "kill") raise(SIGKILL);
            if (act == "stop") raise(SIGSTOP);
            if (act == "crash") raise(SIGSEGV);
            if (act == "spin") for (volatile int forever = 1; forever; ) {}
            if (act == "hang") rest(1000);
            if (act == "library") ranks_watch_library([] { return std::string("a library: link down"); }), rest(1000);
            if (act == "die") die("token 7 has id 99999; check the data");
            if (act == "exit") exit(0);
            if (act == "slow") rest(timeout > 0 ? 0.6 * timeout : 1.5);
            if (act == "alive") for (int i = 0; i < 8; i++) { rest(0.25 * timeout); ranks_alive(); }
        }
        if (step == steps) break;
        ranks_note("all-reduce", step % 4);
        all_reduce(board);
        rest(0.002);
    }
    ranks_leave();
    printf("done\n");
    return 0;
}
