// Rows between the ranks that share the experts, with --ep: how many, what is sent in which order, and how it runs
// during the experts' matmuls.
//
// What is sent is in the order of dispatch. What arrives is ordered by expert, and within it by rank, so that an
// expert's rows are one matrix. Nothing is padded, nothing dropped. Rows travel in pieces: those of some of each rank's
// experts, which are one run at their receiver.
//
// Included once, by olmoe.cu, after its groups and `collective`.
#pragma once
#include "trace.h"

constexpr int PIECES = 4;                   // at most so many, for ranks that share the experts

// Neighbouring experts [begin, end) of this rank, and their rows [first, first + rows)
struct Piece { size_t begin, end, first; int rows; };

// Rows of one layer, on the host, because it gives the experts' matmuls their shapes
struct RowCounts {
    std::vector<int> sent;                  // (E) rows that this rank's tokens send to each expert
    std::vector<int> arrived;               // (G, E/G) rows from each rank of the expert group for each expert here
    std::vector<int> here;                  // (E/G) their sums over the ranks: what each expert of this rank computes
    std::vector<Piece> pieces;              // of the experts of this rank, in their order
    int total() const { return std::accumulate(here.begin(), here.end(), 0); }
};

// Fills in `here` and `pieces` from `arrived`.
void cut_rows(RowCounts* rows) {
    const size_t mine = rows->arrived.size() / expert_group.size;
    const size_t n = expert_group.size > 1 ? std::min<size_t>(PIECES, mine) : 1;
    rows->here.assign(mine, 0);
    for (size_t i = 0; i < rows->arrived.size(); i++) rows->here[i % mine] += rows->arrived[i];
    rows->pieces.clear();
    for (size_t i = 0, first = 0; i < n; first += rows->pieces[i++].rows) {
        auto begin = rows->here.begin() + mine * i / n, end = rows->here.begin() + mine * (i + 1) / n;
        rows->pieces.push_back({mine * i / n, mine * (i + 1) / n, first, std::accumulate(begin, end, 0)});
    }
}

// arrivals (G, E/G) from the counts of all ranks of the group, as soon as dispatch has counted
void exchange_counts(int* arrivals /* (G, E/G) */, const int* counts /* (E) */, int E, int layer) {
    int G = expert_group.size, mine = E / G;
    cudaCheck(cudaStreamWaitEvent(comm_stream, copy_event, 0));
    waited(comm_stream);
    collective("exchange of counts", layer, COUNTS, (size_t)(E - mine) * sizeof(int), [&] {
        for (int g = 0; g < G; g++) {
            ncclCheck(ncclSend(counts + g * mine, mine, ncclInt, g, expert_group.comm, comm_stream));
            ncclCheck(ncclRecv(arrivals + g * mine, mine, ncclInt, g, expert_group.comm, comm_stream));
        }
    });
}

// Rows to the ranks of their experts, or from there back to where they came from
enum class Way { to_experts, home };

// An array whose rows travel, where they come from, and the bytes of a row
struct RowArray { void* to; const void* from; size_t bytes; };

// The rows of a piece, of several arrays together
void exchange_rows(const std::vector<RowArray>& arrays, const RowCounts& rows, int piece, Way way, const char* name,
                   int layer) {
    const std::vector<int> &sent = rows.sent, &arrived = rows.arrived;
    const int E = (int)sent.size(), G = expert_group.size, mine = E / G;
    const int begin = (int)rows.pieces[piece].begin, end = (int)rows.pieces[piece].end;
    const bool home = way == Way::home;
    size_t leaving = 0, bytes = 0;          // rows that go to other ranks, and the bytes of each
    for (int g = 0; g < G; g++)
        for (int i = g * mine + begin; i < g * mine + end; i++)
            if (g != expert_group.rank) leaving += home ? arrived[i] : sent[i];
    for (const RowArray& a : arrays) bytes += a.bytes;
    auto send = [&](size_t row, size_t n, int rank) {
        for (const RowArray& a : arrays)
            if (n > 0) ncclCheck(ncclSend((const char*)a.from + row * a.bytes, n * a.bytes, ncclChar, rank,
                                          expert_group.comm, comm_stream));
    };
    auto receive = [&](size_t row, size_t n, int rank) {
        for (const RowArray& a : arrays)
            if (n > 0) ncclCheck(ncclRecv((char*)a.to + row * a.bytes, n * a.bytes, ncclChar, rank,
                                          expert_group.comm, comm_stream));
    };
    std::vector<size_t> start(E + 1, 0);    // of the rows of this rank's tokens, by expert
    for (int i = 0; i < E; i++) start[i + 1] = start[i] + sent[i];
    size_t row = rows.pieces[piece].first;  // of this rank's experts
    // Two ranks name their experts in the same order, also where the calls are too many for one group of NCCL's.
    const int n = std::max(1, GROUP_CALLS / (2 * G * (int)arrays.size()));
    for (int first = begin; first < end; first += n)
        collective(name, layer, ROWS, first == begin ? leaving * bytes : 0, [&] {
            for (int e = first; e < std::min(end, first + n); e++)
                for (int g = 0; g < G; g++) {
                    const int i = g * mine + e;                 // expert e of rank g, or of its tokens for expert e
                    if (home) receive(start[i], sent[i], g); else send(start[i], sent[i], g);
                    if (home) send(row, arrived[i], g); else receive(row, arrived[i], g);
                    row += arrived[i];
                }
        });
}

// The work of the experts on rows that travel: bring(i) sends piece i to the experts, compute(i) works on it in the
// main stream, give(i) sends home what came of it. In the stream of the collectives the order is, on all ranks,
//     bring 0, bring 1, give 0, bring 2, give 1, bring 3, ...
// so that the next piece arrives, and the last results leave, during compute. One rank alone only computes.
template <typename Bring, typename Compute, typename Give>
void in_pieces(int pieces, Bring bring, Compute compute, Give give) {
    if (expert_group.size == 1) return compute(0);
    auto begin = [&](int i) {
        if (i >= pieces) return;
        bring(i);
        cudaCheck(cudaEventRecord(arrival_events[i % 2], comm_stream));
    };
    comm_after_main();
    begin(0);
    begin(1);
    for (int i = 0; i < pieces; i++) {
        cudaCheck(cudaStreamWaitEvent(main_stream.stream, arrival_events[i % 2], 0));
        waited(main_stream.stream);
        compute(i);
        comm_after_main();
        give(i);
        begin(i + 2);
    }
    main_after_comm();
}
