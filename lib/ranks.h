// Who the ranks are, and whether they live. A rank is one process of a training, and each has a GPU (or some cores) of
// its own.
//
// Ranks find one another by MPI where mpirun, or srun with PMIx, started them. Without MPI they meet at a rendezvous
// that the user names: HOST:PORT, where rank 0 listens, or a file on a disk that all see, into which rank 0 writes
// where it listens.
//
// A collective waits forever for a rank that does not come. So next to the collectives, over TCP (IPv4), a thread of
// every rank sends heartbeats to rank 0, and rank 0 to all. Three things are failures:
//   gone      a connection closes without a goodbye: the process was killed, or crashed. Noticed at once.
//   silent    no heartbeat for `timeout` seconds: the process is stopped, or its machine or network is dead.
//   still     heartbeats come, but no rank has begun a collective for `timeout` seconds: the one that has begun the
//             fewest is waited for. As long as any rank moves, a slow one is left alone.
// One rank then reports on standard error which rank it was and at which collective; every rank ends with exit code 1,
// and a stopped one on the same machine is killed. The end of rank 0 is reported by one rank of each machine.

#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX    // MPI from C, without Open MPI's old C++ interface
#endif
#include <mpi.h>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Ranks {
    int rank = 0, size = 1;
    int local_rank = 0, local_size = 1;     // among the ranks of this machine
    std::string started_by = "alone";       // "mpirun", "srun", "rendezvous node1:29500": for people to read
};

inline double ranks_patience = 60;          // seconds in which all ranks have to come to the rendezvous
constexpr double RANKS_GRACE = 2;           // seconds that ranks have to end in, once one has failed

// What a process reports about itself to rank 0, which sends it to all. boot and names are its machine (a boot of it)
// and its pid namespace: only where both agree does pid mean the same process. started (clock ticks since boot, from
// /proc/PID/stat) distinguishes it from a later process of the same number.
struct RankHello {
    char magic[8];
    uint64_t token;                         // of the meeting, so that no rank joins another run's
    uint64_t started;
    int32_t rank, size, pid;
    char host[64], boot[128], names[32], job[128];
};
struct RankAnswer {
    char magic[8];
    uint64_t token;
    int32_t retry;                          // 1: this is another run; ask again
    char refusal[256];                      // empty: welcome
};
struct RankMeeting {                        // where rank 0 listens
    uint64_t token = 0;
    int port = 0;
    char hosts[512] = "";                   // names and addresses of its machine, to be tried in this order
};

// A heartbeat. The word holds from then on. LEAVES: this rank has come to ranks_leave; from rank 0: all have. FAILED:
// the failure has been reported, end without another message.
enum RankWord { RUNS, LEAVES, FAILED };
struct RankBeat {
    int32_t word, layer;
    uint64_t sequence;                      // collectives begun since the start
    uint64_t signs;                         // of life in between: ranks_alive
    char what[48];                          // the last collective; empty: none yet
};
struct RankPeer {
    int socket = -1;
    bool closed = false;
    double heard = 0;                       // when the last heartbeat came
    RankBeat last = {};
    size_t filled = 0;                      // bytes of the next one that are here
    char next[sizeof(RankBeat)];
};

struct RankState {
    Ranks self;
    bool mpi = false;                       // MPI was initialised here
    std::vector<RankHello> all;             // (size)
    int listener = -1;                      // of rank 0 at a rendezvous
    std::vector<int> data;                  // sockets of ranks_broadcast without MPI: of rank 0 (size), else only [0]
    // The watch. Only its thread uses what follows, except for the atomics.
    std::vector<RankPeer> peers;            // (size); rank 0 is connected to all, the others only to [0]
    double timeout = 0, period = 1;         // seconds
    uint64_t token = 0;
    int wake = -1;                          // an eventfd: the main thread wants something
    std::thread thread;
    std::mutex library_mutex;
    std::string (*library_error)() = nullptr;   // under the mutex
    std::atomic<bool> watching{false}, leaving{false}, spoken{false};
    std::atomic<const char*> what{""};
    std::atomic<int> layer{-1};
    std::atomic<uint64_t> sequence{0}, signs{0};
};
inline RankState* const ranks_state = new RankState;   // never freed: the thread uses it until the end

// ------------------------------------------------------------------------------------------------
// Small things

inline double ranks_time() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void ranks_sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// When the process started; 0 when it has ended, also where its exit code is not collected yet.
inline uint64_t ranks_process_started(int pid) {
    std::string line, state, field;
    std::getline(std::ifstream("/proc/" + std::to_string(pid) + "/stat"), line);
    // Before the last ')' are the pid and the name, which may contain anything.
    std::istringstream fields(line.substr(line.rfind(')') + 1));
    fields >> state;
    for (int i = 4; i <= 22; i++) fields >> field;
    return state == "Z" || state == "X" ? 0 : strtoull(field.c_str(), nullptr, 10);
}

// "rank 3", "ranks 1, 2"; of many the first eight
inline std::string ranks_list(const std::vector<int>& which) {
    std::string list = which.size() == 1 ? "rank " : "ranks ";
    for (size_t i = 0; i < which.size() && i < 8; i++) list += (i ? ", " : "") + std::to_string(which[i]);
    return list + (which.size() > 8 ? " and " + std::to_string(which.size() - 8) + " more" : "");
}

// The number in an environment variable, -1 when there is none
inline int64_t ranks_variable(const char* name) {
    const char* given = getenv(name);
    char* end = nullptr;
    int64_t value = given ? strtoll(given, &end, 10) : -1;
    return given && end != given && *end == 0 && value >= 0 ? value : -1;
}

// ------------------------------------------------------------------------------------------------
// TCP. Sockets close on exec: a child that held one open would hide the end of its parent.

inline int ranks_listen(bool loopback, int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    address.sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (sockaddr*)&address, sizeof address) != 0 || listen(fd, 4096) != 0)
        die("rank 0 cannot listen on port %d: %s; is another run there?", port, strerror(errno));
    return fd;
}

inline int ranks_port(int listener) {
    sockaddr_in address = {};
    socklen_t size = sizeof address;
    getsockname(listener, (sockaddr*)&address, &size);
    return ntohs(address.sin_port);
}

inline void ranks_time_limit(int fd, double seconds) {      // 0: none
    timeval limit = {(time_t)seconds, (suseconds_t)((seconds - (time_t)seconds) * 1e6)};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

// Whether the connection that a non-blocking socket has begun is there within 2 s
inline bool ranks_connected(int fd) {
    pollfd ready = {fd, POLLOUT, 0};
    int error = 0;
    socklen_t size = sizeof error;
    return poll(&ready, 1, 2000) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0;
}

inline int ranks_dial(const std::string& host, int port) {  // -1 when no process answers within 2 s
    addrinfo hints = {}, *list = nullptr;
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list) != 0) return -1;
    int fd = -1;
    for (addrinfo* a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        bool connected = connect(fd, a->ai_addr, a->ai_addrlen) == 0 || (errno == EINPROGRESS && ranks_connected(fd));
        if (!connected) { close(fd); fd = -1; }
    }
    freeaddrinfo(list);
    if (fd >= 0) fcntl(fd, F_SETFL, 0);                     // blocking again
    return fd;
}

inline bool ranks_send(int fd, const void* bytes, size_t n) {
    for (const char* p = (const char*)bytes; n > 0; ) {
        ssize_t sent = send(fd, p, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) return false;
        p += sent; n -= (size_t)sent;
    }
    return true;
}

inline bool ranks_receive(int fd, void* bytes, size_t n) {
    for (char* p = (char*)bytes; n > 0; ) {
        ssize_t got = recv(fd, p, n, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        p += got; n -= (size_t)got;
    }
    return true;
}

// ------------------------------------------------------------------------------------------------
// Meeting: rank 0 listens, the others come. Each connection begins with a hello and its answer. They keep out
// other programs and other runs that come by mistake, not attackers: as with NCCL's connections, nothing is encrypted.

inline RankHello ranks_hello(uint64_t token) {
    RankHello h = {};
    memcpy(h.magic, "olmoe>1", 8);
    h.token = token;
    h.rank = ranks_state->self.rank; h.size = ranks_state->self.size; h.pid = (int32_t)getpid();
    h.started = ranks_process_started(h.pid);
    gethostname(h.host, sizeof h.host - 1);
    std::string boot;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
    snprintf(h.boot, sizeof h.boot, "%s %s", h.host, boot.c_str());
    if (readlink("/proc/self/ns/pid", h.names, sizeof h.names - 1) < 0) h.names[0] = 0;
    std::string job = "job";                                // the same in all processes of a job
    for (const char* name : {"SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID"})
        job += std::string(":") + (getenv(name) ? getenv(name) : "");
    std::replace(job.begin(), job.end(), ' ', '_');
    snprintf(h.job, sizeof h.job, "%s", job.c_str());
    return h;
}

// Rank 0's answer to a hello. own: rank 0's, with the token of the meeting. taken: this rank has come before.
inline RankAnswer ranks_answer(const RankHello& h, const RankHello& own, bool numbered, bool taken) {
    RankAnswer answer = {};
    memcpy(answer.magic, "olmoe<1", 8);
    answer.token = h.token;
    answer.retry = h.token != own.token || strcmp(h.job, own.job) != 0;
    if (answer.retry) return answer;
    if (!numbered)
        snprintf(answer.refusal, sizeof answer.refusal, "one process is rank 0 of %d, another rank %d of %d",
                 own.size, h.rank, h.size);
    else if (taken)
        snprintf(answer.refusal, sizeof answer.refusal,
                 "two processes are rank %d; does another run use the same rendezvous?", h.rank);
    return answer;
}

// Rank 0: a socket to every rank, and who they are in ranks_state->all. Connections of others are closed. A rank that
// has not come in time, or has come twice, is an error; `where` names the meeting.
inline std::vector<int> ranks_accept(int listener, uint64_t token, const std::string& where) {
    RankState* s = ranks_state;
    RankHello own = ranks_hello(token);
    std::vector<int> sockets(s->self.size, -1), missing;
    s->all.assign(s->self.size, own);
    rlimit files;                           // two sockets a rank: for 500 ranks more than 1024, a usual limit
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) { files.rlim_cur = files.rlim_max; setrlimit(RLIMIT_NOFILE, &files); }
    for (double deadline = ranks_time() + ranks_patience; ; ) {
        missing.clear();
        for (int r = 1; r < s->self.size; r++) if (sockets[r] < 0) missing.push_back(r);
        if (missing.empty()) return sockets;
        double left = deadline - ranks_time();
        if (left <= 0)
            die("%s: after %.0f s %s of %d did not come; did it start, and can its machine reach port %d of %s?",
                where.c_str(), ranks_patience, ranks_list(missing).c_str(), s->self.size,
                ranks_port(listener), own.host);
        pollfd ready = {listener, POLLIN, 0};
        if (poll(&ready, 1, (int)(left * 1000) + 1) <= 0) continue;
        int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) continue;
        ranks_time_limit(fd, 2);
        RankHello h;
        bool heard = ranks_receive(fd, &h, sizeof h) && memcmp(h.magic, own.magic, sizeof h.magic) == 0;
        if (!heard) { close(fd); continue; }
        h.host[sizeof h.host - 1] = h.boot[sizeof h.boot - 1] = 0;
        h.names[sizeof h.names - 1] = h.job[sizeof h.job - 1] = 0;

        bool numbered = h.size == s->self.size && h.rank > 0 && h.rank < h.size;
        RankAnswer answer = ranks_answer(h, own, numbered, numbered && sockets[h.rank] >= 0);
        bool sent = ranks_send(fd, &answer, sizeof answer);
        if (answer.refusal[0]) die("%s: %s", where.c_str(), answer.refusal);
        if (answer.retry || !sent) { close(fd); continue; }
        sockets[h.rank] = fd;
        s->all[h.rank] = h;
    }
}

// The others: a socket to rank 0, which is where `find` says, once it says so.
inline int ranks_come(const std::function<bool(RankMeeting*)>& find, const std::string& where) {
    for (double deadline = ranks_time() + ranks_patience; ranks_time() < deadline; ranks_sleep(0.05)) {
        RankMeeting meeting;
        if (!find(&meeting)) continue;
        RankHello hello = ranks_hello(meeting.token);
        std::istringstream hosts(meeting.hosts);
        for (std::string host; hosts >> host; ) {
            int fd = ranks_dial(host, meeting.port);
            if (fd < 0) continue;
            ranks_time_limit(fd, 10);
            RankAnswer answer;
            bool answered = ranks_send(fd, &hello, sizeof hello) && ranks_receive(fd, &answer, sizeof answer)
                            && memcmp(answer.magic, "olmoe<1", 8) == 0 && answer.token == hello.token && !answer.retry;
            if (answered && !answer.refusal[0]) return fd;
            close(fd);
            if (!answered) continue;
            answer.refusal[sizeof answer.refusal - 1] = 0;
            die("%s: %s", where.c_str(), answer.refusal);
        }
    }
    die("%s: rank 0 did not answer rank %d of %d within %.0f s; did it start, and is it where the rendezvous says?",
        where.c_str(), ranks_state->self.rank, ranks_state->self.size, ranks_patience);
}

// Where rank 0 listens, for the others: the addresses of its interfaces, then its name, for which DNS may be slow.
inline RankMeeting ranks_meeting(int listener, bool one_machine) {
    RankMeeting m;
    m.port = ranks_port(listener);
    std::random_device source;
    m.token = (uint64_t)source() << 32 | source();
    std::string hosts;
    ifaddrs* list = nullptr;
    if (!one_machine && getifaddrs(&list) == 0) {
        for (ifaddrs* i = list; i; i = i->ifa_next) {
            char address[INET_ADDRSTRLEN];
            if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET) continue;
            if ((i->ifa_flags & IFF_LOOPBACK) || !(i->ifa_flags & IFF_UP)) continue;
            const in_addr* binary = &((sockaddr_in*)i->ifa_addr)->sin_addr;
            if (hosts.size() < 300 && inet_ntop(AF_INET, binary, address, sizeof address))
                hosts += std::string(address) + " ";
        }
        freeifaddrs(list);
    }
    hosts += "127.0.0.1";
    if (!one_machine) hosts += std::string(" ") + ranks_hello(0).host;
    snprintf(m.hosts, sizeof m.hosts, "%s", hosts.c_str());
    return m;
}

// A file of an earlier run does no harm: the port in it is closed, or the process that listens there now does not know
// the token, and the reader looks again until rank 0 has replaced the file. Rank 0 removes it when all have come.
inline void ranks_file_write(const std::string& path, const RankMeeting& m) {
    std::string line = "olmoe-rendezvous " + std::to_string(m.token) + " " + std::to_string(m.port) + " "
                       + ranks_hello(0).job + " " + m.hosts + " end\n";
    std::string next = path + "." + std::to_string(m.token);
    int fd = open(next.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool written = fd >= 0 && write(fd, line.data(), line.size()) == (ssize_t)line.size() && fsync(fd) == 0;
    int error = errno;
    if (fd >= 0) close(fd);
    if (!written || rename(next.c_str(), path.c_str()) != 0) {
        if (written) error = errno;
        unlink(next.c_str());
        die("rendezvous %s: cannot be written: %s", path.c_str(), strerror(error));
    }
}

// Removes a rendezvous file where there is one; dies where there is a file of another kind that is not empty.
inline void ranks_file_remove(const std::string& path) {
    char word[17] = "";
    std::ifstream(path).read(word, 16);
    if (strcmp(word, "olmoe-rendezvous") == 0) unlink(path.c_str());
    else if (word[0])
        die("rendezvous %s: there is a file of another kind; choose a name that does not exist", path.c_str());
}

// False where there is no file yet, or not one of this job.
inline bool ranks_file_read(const std::string& path, RankMeeting* m) {
    size_t slash = path.rfind('/');         // opening its directory makes NFS look again whether there is such a file
    DIR* directory = opendir(slash == std::string::npos ? "." : path.substr(0, slash + 1).c_str());
    if (directory) closedir(directory);
    char line[1024] = "", word[32], job[128], hosts[512];
    FILE* file = fopen(path.c_str(), "r");
    if (!file) return false;
    bool got = fgets(line, sizeof line, file);
    fclose(file);
    char* end = strstr(line, " end\n");
    unsigned long long token;
    if (!got || !end) return false;
    *end = 0;
    if (sscanf(line, "%31s %llu %d %127s %511[^\n]", word, &token, &m->port, job, hosts) != 5) return false;
    if (strcmp(word, "olmoe-rendezvous") != 0) return false;
    m->token = token;
    memcpy(m->hosts, hosts, sizeof hosts);
    return strcmp(job, ranks_hello(0).job) == 0;
}

// ------------------------------------------------------------------------------------------------
// The start

// The variables by which launchers number their processes, the most particular first: srun may have started torchrun.
struct RankVariables { const char *rank, *size, *local; };
constexpr RankVariables RANK_VARIABLES[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK"},                       // torchrun, or a shell loop
    // Open MPI's mpirun
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},                // MPICH, Intel MPI, srun --mpi=pmi2
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"},  // srun
    {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"},
};

// The ranks by one launcher's variables; false where it has set none. Slurm sets its own also in a batch
// script and in the shell of salloc, neither of which is one of several: they have no step, or one of the highest
// numbers, which Slurm keeps for these.
inline bool ranks_by_variables(const RankVariables& v, Ranks* r) {
    int64_t rank = ranks_variable(v.rank), size = ranks_variable(v.size), local = ranks_variable(v.local);
    int64_t step = ranks_variable("SLURM_STEP_ID");
    if (rank < 0 || size < 1 || size > 1 << 20 || rank >= size) return false;
    // That is the number of the job's tasks. The step's goes before it.
    if (strcmp(v.size, "SLURM_NTASKS") == 0 && ranks_variable("SLURM_STEP_NUM_TASKS") >= 0) return false;
    if (strcmp(v.rank, "SLURM_PROCID") == 0 && rank == 0 && (step < 0 || step >= 0xfffffff0)) return false;
    r->rank = (int)rank; r->size = (int)size; r->local_rank = (int)local;
    return true;
}

// This process's number by its launcher's variables, before the ranks have met; 0 where there are none
inline int ranks_number() {
    Ranks r;
    for (const RankVariables& v : RANK_VARIABLES) if (ranks_by_variables(v, &r)) return r.rank;
    return 0;
}

// The variable by which a launcher announces that this process is one of several, "WORLD_SIZE=4"; empty where none
// does. Open MPI's goes before the others': mpirun may run below srun.
inline std::string ranks_announced() {
    bool open_mpi = getenv("OMPI_COMM_WORLD_SIZE");
    Ranks r;
    for (const RankVariables& v : RANK_VARIABLES) {
        if (open_mpi && strncmp(v.size, "OMPI", 4) != 0) continue;
        bool slurm = strncmp(v.size, "SLURM", 5) == 0;
        bool several = slurm ? ranks_by_variables(v, &r) && r.size > 1 : ranks_variable(v.size) > 1;
        if (several) return std::string(v.size) + "=" + getenv(v.size);
    }
    return !open_mpi && ranks_variable("PMIX_RANK") > 0 ? std::string("PMIX_RANK=") + getenv("PMIX_RANK") : "";
}

// Rank 0's bytes to all ranks: n bytes, the same n everywhere. Collective, and made for the start: by MPI, or rank
// after rank over TCP. Dies, or lets the watch report why, where a rank is gone.
inline void ranks_broadcast(void* bytes, size_t n) {
    RankState* s = ranks_state;
    if (s->self.size == 1) return;
    if (s->mpi) {
        for (size_t at = 0; at < n; at += 1 << 30)
            MPI_Bcast((char*)bytes + at, (int)std::min(n - at, (size_t)1 << 30), MPI_BYTE, 0, MPI_COMM_WORLD);
        return;
    }
    for (int r = 0; r < (int)s->data.size(); r++) {
        int fd = s->data[r];
        if (fd < 0 || (s->self.rank == 0 ? ranks_send(fd, bytes, n) : ranks_receive(fd, bytes, n))) continue;
        if (s->watching) ranks_sleep(s->timeout + 2 * RANKS_GRACE);     // the watch reports why
        die("rank %d has gone, or said nothing for %.0f s, while the ranks started", r, ranks_patience);
    }
}

// True: it is HOST:PORT; false: the path of a file
inline bool ranks_is_address(const std::string& rendezvous) {
    size_t colon = rendezvous.rfind(':');
    if (colon == std::string::npos || colon == 0 || colon + 1 == rendezvous.size()) return false;
    return rendezvous.find_first_of("/ ") == std::string::npos
           && rendezvous.find_first_not_of("0123456789", colon + 1) == std::string::npos;
}

// The number of ranks on this machine, and this rank's among them where its launcher has not set it
inline void ranks_count_local() {
    RankState* s = ranks_state;
    int below = 0;
    s->self.local_size = 0;
    for (int r = 0; r < s->self.size; r++) {
        bool here = strcmp(s->all[r].boot, s->all[s->self.rank].boot) == 0;
        s->self.local_size += here;
        below += here && r < s->self.rank;
    }
    if (s->self.local_rank < 0) s->self.local_rank = below;
}

// Meets at HOST:PORT or at a file, and fills in the local rank and the number of ranks on this machine.
inline void ranks_rendezvous(const std::string& rendezvous) {
    RankState* s = ranks_state;
    bool address = ranks_is_address(rendezvous);
    size_t colon = rendezvous.rfind(':');
    std::string where = "rendezvous " + rendezvous, host = address ? rendezvous.substr(0, colon) : "";
    int port = address ? (int)std::min(strtoul(rendezvous.c_str() + colon + 1, nullptr, 10), 65536ul) : 0;
    if (address && (port < 1 || port > 65535)) die("%s: a port is a number from 1 to 65535", where.c_str());
    if (host.size() > 255) die("%s: the name of the host is too long", where.c_str());

    RankMeeting known;                      // at an address there is no token but the job's number
    known.port = port;
    snprintf(known.hosts, sizeof known.hosts, "%s", host.c_str());
    auto find = [&](RankMeeting* m) {
        *m = known;
        return address || ranks_file_read(rendezvous, m);
    };
    if (s->self.size == 1) {
        s->all = {ranks_hello(0)};
    } else if (s->self.rank == 0) {
        if (!address) ranks_file_remove(rendezvous);
        s->listener = ranks_listen(host == "localhost" || host.compare(0, 4, "127.") == 0, port);
        if (!address) {
            known = ranks_meeting(s->listener, false);
            ranks_file_write(rendezvous, known);
        }
        s->data = ranks_accept(s->listener, known.token, where);
        if (!address) ranks_file_remove(rendezvous);
    } else {
        s->data = {ranks_come(find, where)};
    }
    for (int fd : s->data) if (fd >= 0) ranks_time_limit(fd, ranks_patience);
    s->all.resize(s->self.size);
    ranks_broadcast(s->all.data(), s->all.size() * sizeof(RankHello));
    ranks_count_local();
    s->self.started_by = where;
}

// The ranks of MPI, which it initialises
inline void ranks_from_mpi() {
    RankState* s = ranks_state;
    int level;
    MPI_Comm machine;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level);
    s->mpi = true;
    MPI_Comm_rank(MPI_COMM_WORLD, &s->self.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &s->self.size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, s->self.rank, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &s->self.local_rank);
    MPI_Comm_size(machine, &s->self.local_size);
    MPI_Comm_free(&machine);
    bool mpirun = getenv("OMPI_COMM_WORLD_SIZE") || !getenv("SLURM_STEP_ID");
    if (s->self.size > 1) s->self.started_by = mpirun ? "mpirun" : "srun";
}

// Finds the ranks; call it once, before anything else that concerns them. rendezvous: HOST:PORT, or the path of a file
// (a name with a slash, or without a number after its last colon), for ranks without MPI; it goes before MPI. Empty:
// MPI, where a launcher of MPI has started this process, else one rank. mpi_only: refuse a rendezvous, because the
// collectives are MPI's. Dies with one line where ranks have not come within 60 s, or where a launcher's variables
// announce several ranks that MPI does not see. MPI is initialised for calls from the main thread only.
inline Ranks ranks_start(const std::string& rendezvous, bool mpi_only) {
    RankState* s = ranks_state;
    s->self = Ranks();
    if (!rendezvous.empty()) {
        if (mpi_only)
            die("--rendezvous %s: this build's ranks communicate by MPI; start them by mpirun, without --rendezvous",
                rendezvous.c_str());
        bool found = false;
        for (const RankVariables& v : RANK_VARIABLES) if (!found) found = ranks_by_variables(v, &s->self);
        if (!found)
            die("--rendezvous %s: which rank is this? start it by srun or torchrun, or set RANK and WORLD_SIZE "
                "(0 <= RANK < WORLD_SIZE)", rendezvous.c_str());
        ranks_rendezvous(rendezvous);
        return s->self;
    }
    std::string several = ranks_announced();        // now: MPI, initialised alone, changes these variables
    bool launcher = false;
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK"})
        launcher = launcher || getenv(name);
    if (launcher) ranks_from_mpi();         // otherwise not: to initialise MPI for one rank takes up to a second
    if (s->self.size > 1 || several.empty()) return s->self;
    for (const char* local : {"OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"})
        if (ranks_variable(local) > 0) _exit(1);    // one process of a machine reports it for all
    die("%s, but this process finds no other rank, and each would train alone; start by mpirun or srun --mpi=pmix, "
        "with a program built with that MPI%s; for one rank unset %s",
        several.c_str(), mpi_only ? "" : ", or give --rendezvous", several.substr(0, several.find('=')).c_str());
}

// ------------------------------------------------------------------------------------------------
// The watch. All of this but ranks_watch runs in its thread.

inline RankBeat ranks_beat(RankWord word) {
    RankState* s = ranks_state;
    RankBeat b = {};
    b.word = word; b.layer = s->layer; b.sequence = s->sequence; b.signs = s->signs;
    snprintf(b.what, sizeof b.what, "%s", s->what.load());
    return b;
}

inline std::string ranks_place(const RankBeat& b) {
    if (!b.what[0]) return "before the first collective";
    return std::string("at the ") + b.what + (b.layer >= 0 ? " of layer " + std::to_string(b.layer) : "");
}

inline std::string ranks_details(int rank, const RankBeat& b) {
    const RankHello& h = ranks_state->all[rank];
    return " (pid " + std::to_string(h.pid) + " on " + h.host + ", last heard " + ranks_place(b) + ")";
}

inline void ranks_tell(RankWord word) {
    RankBeat b = ranks_beat(word);
    for (RankPeer& p : ranks_state->peers)  // a full buffer means that the peer has long stopped reading
        if (p.socket >= 0 && !p.closed) (void)!send(p.socket, &b, sizeof b, MSG_NOSIGNAL | MSG_DONTWAIT);
}

// Takes in what has come, waiting at most `seconds` for it. `tick` returns the time, which is noted for each rank that
// is heard.
inline void ranks_listen_to_peers(double seconds, const std::function<double()>& tick) {
    RankState* s = ranks_state;
    std::vector<pollfd> ready = {{s->wake, POLLIN, 0}};
    for (RankPeer& p : s->peers) if (p.socket >= 0 && !p.closed) ready.push_back({p.socket, POLLIN, 0});
    poll(ready.data(), ready.size(), (int)(std::max(seconds, 0.0) * 1000) + 1);
    double now = tick();
    uint64_t calls;
    if (ready[0].revents) (void)!read(s->wake, &calls, sizeof calls);
    for (RankPeer& p : s->peers)
        while (p.socket >= 0 && !p.closed) {
            ssize_t n = recv(p.socket, p.next + p.filled, sizeof p.next - p.filled, MSG_DONTWAIT);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && errno == EAGAIN) break;
            if (n <= 0) { p.closed = true; break; }
            p.filled += (size_t)n;
            p.heard = now;
            if (p.filled < sizeof p.next) continue;
            memcpy(&p.last, p.next, sizeof p.next);
            p.last.what[sizeof p.last.what - 1] = 0;
            p.filled = 0;
        }
}

// Sends the last word and waits until the others have heard it and closed: a socket that is closed with heartbeats
// unread would drop what is still on its way.
inline void ranks_part(RankWord word, double deadline) {
    RankState* s = ranks_state;
    ranks_tell(word);
    for (RankPeer& p : s->peers) if (p.socket >= 0) shutdown(p.socket, SHUT_WR);
    auto is_open = [](const RankPeer& p) { return p.socket >= 0 && !p.closed; };
    auto any_open = [&] { return std::any_of(s->peers.begin(), s->peers.end(), is_open); };
    while (any_open() && ranks_time() < deadline) ranks_listen_to_peers(deadline - ranks_time(), ranks_time);
}

// Is this the first rank of its machine to come here? It reports for all of them. The mark is a name in the kernel,
// gone with the process.
inline bool ranks_first_of_machine() {
    if (!ranks_state->watching) return true;
    static const bool first = [] {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_un name = {};
        name.sun_family = AF_UNIX;
        int n = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "olmoe-%016llx",
                         (unsigned long long)ranks_state->token);
        socklen_t size = (socklen_t)(offsetof(sockaddr_un, sun_path) + 1 + (size_t)n);
        return bind(fd, (sockaddr*)&name, size) == 0 || errno != EADDRINUSE;
    }();
    return first;
}

// The process of another rank where it is on this machine and lives, else 0
inline int ranks_sibling(int rank) {
    const RankHello &h = ranks_state->all[rank], &own = ranks_state->all[ranks_state->self.rank];
    bool here = rank != ranks_state->self.rank && strcmp(h.boot, own.boot) == 0 && strcmp(h.names, own.names) == 0;
    return here && h.started && ranks_process_started(h.pid) == h.started ? h.pid : 0;
}

// Ends this rank, and with it all. line: the report, empty where it has been made. silent: a rank that does not answer,
// -1: none.
[[noreturn]] inline void ranks_fail(const std::string& line, int silent = -1) {
    RankState* s = ranks_state;
    bool first = ranks_first_of_machine();
    if (!line.empty() && (s->self.rank == 0 || first)) {
        std::string message = "olmoe: " + line + "\n";
        pollfd ready = {STDERR_FILENO, POLLOUT, 0};     // a full pipe that no process reads must not stop this one
        if (poll(&ready, 1, 1000) == 1) (void)!write(STDERR_FILENO, message.data(), message.size());
    }
    if (silent >= 0 && ranks_sibling(silent)) kill(ranks_sibling(silent), SIGKILL);
    double deadline = ranks_time() + RANKS_GRACE;
    ranks_part(FAILED, deadline);
    for (int r = 0; first && r < s->self.size; r++) {
        while (ranks_sibling(r) && ranks_time() < deadline) ranks_sleep(0.01);
        if (int pid = ranks_sibling(r)) kill(pid, SIGKILL);
    }
    _exit(1);
}

// No rank has moved for the timeout: those that have begun the fewest collectives are the ones that the others wait
// for.
[[noreturn]] inline void ranks_fail_still() {
    RankState* s = ranks_state;
    s->peers[0].last = ranks_beat(RUNS);
    int ahead = 0;
    std::vector<int> behind;
    for (int r = 0; r < s->self.size; r++) {
        uint64_t begun = s->peers[r].last.sequence;
        if (!behind.empty() && begun < s->peers[behind[0]].last.sequence) behind.clear();
        if (behind.empty() || begun == s->peers[behind[0]].last.sequence) behind.push_back(r);
        if (begun > s->peers[ahead].last.sequence) ahead = r;
    }
    char seconds[64];
    snprintf(seconds, sizeof seconds, " stood still for %g s", s->timeout);
    const RankBeat& last = s->peers[behind[0]].last;
    if ((int)behind.size() == s->self.size)
        ranks_fail("all " + std::to_string(s->self.size) + " ranks have" + seconds + ", " + ranks_place(last));
    const bool one = behind.size() == 1;
    ranks_fail(ranks_list(behind) + (one ? " has" : " have") + seconds
               + (one ? ranks_details(behind[0], last) : ", last " + ranks_place(last))
               + "; rank " + std::to_string(ahead) + " waits " + ranks_place(s->peers[ahead].last));
}

// Fails where rank r has failed, is gone, or is silent. now: the thread's time.
inline void ranks_check_peer(int r, double now) {
    RankState* s = ranks_state;
    const RankPeer& p = s->peers[r];
    if (p.last.word == FAILED) ranks_fail("");
    if (s->self.rank > 0 && p.last.word == LEAVES) return;
    if (!p.closed && now - p.heard <= s->timeout) return;
    std::string it = "rank " + std::to_string(r), details = ranks_details(r, p.last);
    std::string me = "; rank " + std::to_string(s->self.rank), here = ranks_place(ranks_beat(RUNS));
    if (p.closed) ranks_fail(it + " is gone" + details + me + " was " + here);
    char seconds[64];
    snprintf(seconds, sizeof seconds, " has not answered for %g s", s->timeout);
    ranks_fail(it + seconds + details + me + " is " + here, r);
}

// Fails where a library has an error that no call of the main thread has returned.
inline void ranks_check_library() {
    RankState* s = ranks_state;
    std::lock_guard<std::mutex> lock(s->library_mutex);
    const std::string error = s->library_error ? s->library_error() : "";
    if (error.empty()) return;
    ranks_fail("rank " + std::to_string(s->self.rank) + " " + ranks_place(ranks_beat(RUNS)) + ": " + error);
}

inline void ranks_thread() {
    RankState* s = ranks_state;
    // `now` is a clock that stops while this process is stopped: a process that goes on must not find all others late.
    double now = 0, before = ranks_time(), beat = 0, moved = 0;
    auto tick = [&] {
        double real = ranks_time();
        now += std::min(real - before, 2 * s->period);
        before = real;
        return now;
    };
    uint64_t movement = 0;
    for (bool told = false; ; ) {
        ranks_listen_to_peers(beat - now, tick);
        if (s->spoken) ranks_fail("");
        ranks_check_library();
        bool leaves = s->leaving, all_leave = leaves;
        if (now >= beat || leaves != told) {
            ranks_tell(leaves && s->self.rank > 0 ? LEAVES : RUNS);
            told = leaves;
            beat = now + s->period;
        }
        uint64_t sum = s->sequence + s->signs;
        double quiet = 0;                   // the longest time that a rank has not been heard
        for (int r = 0; r < s->self.size; r++) {
            const RankPeer& p = s->peers[r];
            if (p.socket < 0) continue;
            ranks_check_peer(r, now);
            if (s->self.rank > 0 && p.last.word == LEAVES) return;
            quiet = std::max(quiet, now - p.heard);
            all_leave = all_leave && p.last.word == LEAVES;
            sum += p.last.sequence + p.last.signs;
        }
        if (s->self.rank > 0) continue;
        if (all_leave) { ranks_part(LEAVES, ranks_time() + RANKS_GRACE); return; }
        if (sum != movement) { movement = sum; moved = now; }
        // A rank that has not been heard for a while may soon be silent, which is the better report.
        if (now - moved > s->timeout && quiet < 4 * s->period) ranks_fail_still();
    }
}

inline void ranks_wake() {
    uint64_t one = 1;
    (void)!write(ranks_state->wake, &one, sizeof one);
}

// Ends all ranks, from die(), which has reported why, or at an exit() without ranks_leave; returns where there are no
// others. Skips everything else that is done at exit: CUDA and NCCL may wait there for a collective.
inline void ranks_end() {
    RankState* s = ranks_state;
    if (!s->watching) return;
    fflush(nullptr);
    s->spoken = true;
    ranks_wake();
    ranks_sleep(3 * RANKS_GRACE);           // its thread ends the process
    _exit(1);
}

// Starts the heartbeats: one a second, or ten in timeout_s seconds if that is more. Collective, best right after
// ranks_start, since a failure before is noticed late. timeout_s, the same in all ranks: how long a rank may be silent,
// and how long all may stand still, including a first compilation or the writing of a checkpoint; 0: forever, only the
// end of a process is noticed. From here on a rank that ends without ranks_leave ends all, with exit code 1: by exit()
// silently, because die() has reported why. Dies where ranks cannot reach rank 0.
inline void ranks_watch(double timeout_s) {
    RankState* s = ranks_state;
    if (s->self.size == 1 || s->watching) return;
    s->timeout = timeout_s > 0 ? timeout_s : 1e9;
    s->period = std::min(1.0, s->timeout / 10);
    const std::string where = "watch of the ranks";
    // At a rendezvous they may be containers, each with a network of its own.
    bool one_machine = s->mpi && s->self.local_size == s->self.size;
    RankMeeting meeting;
    std::vector<int> sockets;
    if (s->self.rank == 0) {
        if (s->listener < 0) s->listener = ranks_listen(one_machine, 0);
        meeting = ranks_meeting(s->listener, one_machine);
    }
    ranks_broadcast(&meeting, sizeof meeting);
    s->token = meeting.token;
    if (s->self.rank == 0) {
        sockets = ranks_accept(s->listener, s->token, where);
        close(s->listener);
        s->listener = -1;
    } else {
        sockets = {ranks_come([&](RankMeeting* m) { *m = meeting; return true; }, where)};
    }
    s->all.resize(s->self.size);
    ranks_broadcast(s->all.data(), s->all.size() * sizeof(RankHello));
    for (int fd : s->data) if (fd >= 0) ranks_time_limit(fd, 0);    // from here on the watch sets the limit

    s->peers.resize(s->self.size);
    for (size_t r = 0; r < sockets.size(); r++) s->peers[r].socket = sockets[r];
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake < 0) die("%s: %s", where.c_str(), strerror(errno));
    sigset_t every, before;                 // signals are the main thread's
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    s->thread = std::thread(ranks_thread);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    s->watching = true;
    atexit(ranks_end);
}

// ------------------------------------------------------------------------------------------------
// What the main thread reports

// A collective begins. what: a string literal, its name in messages, after "the"; layer -1: of none. Costs a few
// stores.
inline void ranks_note(const char* what, int layer) {
    ranks_state->what = what;
    ranks_state->layer = layer;
    ranks_state->sequence++;
}

// What the watch asks at each heartbeat: the error of a library, or "". Null: nothing, from when this returns on.
inline void ranks_watch_library(std::string (*error)()) {
    std::lock_guard<std::mutex> lock(ranks_state->library_mutex);
    ranks_state->library_error = error;
}

// A sign of life between collectives, for what may take longer than the timeout: at every tensor of a checkpoint, say.
inline void ranks_alive() { ranks_state->signs++; }

// The normal end. Collective: returns when all ranks have come, and finalizes MPI; a rank that does not come is a
// failure of all.
inline void ranks_leave() {
    RankState* s = ranks_state;
    if (s->watching) {
        ranks_note("end of the run", -1);
        s->leaving = true;
        ranks_wake();
        s->thread.join();
        s->watching = false;
        for (RankPeer& p : s->peers) if (p.socket >= 0) close(p.socket);
        s->peers.clear();
        close(s->wake);
    }
    for (int fd : s->data) if (fd >= 0) close(fd);
    s->data.clear();
    if (s->listener >= 0) close(s->listener);
    s->listener = -1;
    if (s->mpi) MPI_Finalize();
    s->mpi = false;
}
