// The experts' rows on the host: how many, and which expert is launched first. With --ep, rows between the ranks that
// share the experts: what is sent in which order, and how it runs during the experts' matmuls.
//
// A token visits a rank where any of its experts is: its row goes there once, with the numbers and the weights of its K
// experts, and the sum over the experts there comes back. The experts of a rank work in pieces, and a visit is of a
// kind by its pieces: it arrives before the first that has an expert of its token, and leaves after the last. So what
// is sent is ordered by rank, kind and token, and what arrives by kind, rank and token. Nothing is padded, nothing
// dropped.
//
// Included once, by olmoe.cu, after its groups and `collective`.
#pragma once
#include "trace.h"

constexpr int PIECES = 4;                   // at most so many, for ranks that share the experts
static int group_calls = 2048;              // that NCCL takes in one group

inline int num_pieces(int experts /* of a rank */) { return expert_group.size > 1 ? std::min(PIECES, experts) : 1; }
inline int num_kinds(int pieces) { return pieces * (pieces + 1) / 2; }
__host__ __device__ inline int visit_kind(int first, int last) { return last * (last + 1) / 2 + first; }

// Neighbouring experts [begin, end) of this rank, their rows [first, first + rows), and the visits that end with them
struct Piece { size_t begin, end, first; int rows; size_t first_visit = 0; int visits = 0; };

// Rows of one layer, on the host, because it gives the experts' matmuls their shapes
struct RowCounts {
    std::vector<int> sent;                  // (E) rows that this rank's tokens need of each expert
    std::vector<int> arrived;               // (G, E/G) of each rank's tokens, for each expert here
    std::vector<int> here;                  // (E/G) their sums over the ranks: what each expert of this rank computes
    std::vector<Piece> pieces;              // of the experts of this rank, in their order
    std::vector<int> visits_sent;           // (G, kinds) visits of this rank's tokens to each rank
    std::vector<int> visits_arrived;        // (G, kinds) visits of each rank's tokens to this rank
    int total() const { return std::accumulate(here.begin(), here.end(), 0); }
    int num_sent() const { return std::accumulate(visits_sent.begin(), visits_sent.end(), 0); }
    int num_arrived() const { return std::accumulate(visits_arrived.begin(), visits_arrived.end(), 0); }
};

// Fills in `here` and `pieces` from the rest.
void cut_rows(RowCounts* rows) {
    const size_t mine = rows->arrived.size() / expert_group.size, n = num_pieces((int)mine), kinds = num_kinds((int)n);
    rows->here.assign(mine, 0);
    for (size_t i = 0; i < rows->arrived.size(); i++) rows->here[i % mine] += rows->arrived[i];
    rows->pieces.clear();
    size_t first = 0, first_visit = 0;
    for (size_t i = 0; i < n; i++) {
        Piece p = {mine * i / n, mine * (i + 1) / n, first, 0, first_visit};
        for (size_t e = p.begin; e < p.end; e++) p.rows += rows->here[e];
        for (size_t j = 0; j < rows->visits_arrived.size(); j++) {
            const int kind = (int)(j % kinds);
            const bool ends = kind >= visit_kind(0, (int)i) && kind <= visit_kind((int)i, (int)i);
            if (ends) p.visits += rows->visits_arrived[j];
        }
        first += p.rows;
        first_visit += p.visits;
        rows->pieces.push_back(p);
    }
}

// An expert's rows [first, first + n), and the stream that multiplies them
struct ExpertRows { size_t expert, first; int n, stream; };

// The experts of a piece that have rows, in the order of their launch: the largest first, each in the stream that has
// the fewest rows so far, so that the streams end at about the same time. The rows of an expert follow those of the
// experts before it; `here` (experts) is on the host.
std::vector<ExpertRows> expert_order(const std::vector<int>& here, const Piece& piece) {
    std::vector<ExpertRows> order;
    size_t first = piece.first, given[EXPERT_STREAMS] = {};
    for (size_t e = piece.begin; e < piece.end; first += here[e++])
        if (here[e] > 0) order.push_back({e, first, here[e], 0});
    std::stable_sort(order.begin(), order.end(), [](auto& a, auto& b) { return a.n > b.n; });
    for (ExpertRows& e : order) {
        e.stream = (int)(std::min_element(given, given + EXPERT_STREAMS) - given);
        given[e.stream] += e.n;
    }
    return order;
}

// For each expert of a piece that has rows: body(stream, expert, first row, rows). The expert streams go on from where
// the main stream is, and the main stream from where all of them are.
template <typename Body> void for_experts(const RowCounts& rows, int piece, Body body) {
    cudaCheck(cudaEventRecord(main_stream.event, main_stream.stream));
    for (Stream& s : expert_streams) {
        cudaCheck(cudaStreamWaitEvent(s.stream, main_stream.event, 0));
        waited(s.stream);
    }
    for (const ExpertRows& e : expert_order(rows.here, rows.pieces[piece]))
        body(expert_streams[e.stream], e.expert, e.first, e.n);
    for (Stream& s : expert_streams) {
        cudaCheck(cudaEventRecord(s.event, s.stream));
        cudaCheck(cudaStreamWaitEvent(main_stream.stream, s.event, 0));
    }
    waited(main_stream.stream);
}

// ------------------------------------------------------------------------------------------------
// On the device

// Each visit is led by one of its token's assignments, the most probable. One thread for each assignment: the rank and
// the kind of the visit that it leads, rank * kinds + kind, or -1. A rank has `mine` experts in so many pieces.
__global__ void visits_kernel(int* visits, const int* experts, int R, int K, int mine, int pieces) {
    size_t a = thread_index();
    if (a >= (size_t)R) return;
    const int rank = experts[a] / mine, *of_token = experts + a / K * K;
    int first = pieces, last = -1, leader = K;
    for (int k = K - 1; k >= 0; k--) {
        if (of_token[k] / mine != rank) continue;
        int piece = ((of_token[k] % mine + 1) * pieces - 1) / mine;         // of experts [mine p/pieces, ...)
        first = first < piece ? first : piece;
        last = last > piece ? last : piece;
        leader = k;
    }
    visits[a] = leader == (int)(a % K) ? rank * (pieces * (pieces + 1) / 2) + visit_kind(first, last) : -1;
}

// Numbers of experts (n) become those on their rank, which has `mine` from `first` on; others -1. In place.
__global__ void own_experts_kernel(int* experts, int n, int first, int mine) {
    size_t i = thread_index();
    if (i >= (size_t)n) return;
    int e = experts[i] - first;
    experts[i] = e >= 0 && e < mine ? e : -1;
}

// dweights (R) of a rank's tokens from those of their visits (V, K): of a token's k-th expert it is column k of the
// visit to the expert's rank. row_of (R) is the row of the visit that an assignment leads. One thread for each
// assignment.
__global__ void visit_dweights_kernel(float* dweights, const float* of_visits, const int* row_of, const int* experts,
                                      int R, int K, int mine) {
    size_t a = thread_index();
    if (a >= (size_t)R) return;
    size_t leader = a / K * K;
    while (experts[leader] / mine != experts[a] / mine) leader++;
    dweights[a] = of_visits[(size_t)row_of[leader] * K + a % K];
}

// ------------------------------------------------------------------------------------------------
// Exchanges

// arrivals (G, E/G), and after it (G, kinds), from the counts of all ranks of the group, as soon as they are counted
void exchange_counts(int* arrivals, const int* counts /* (E) */, const int* visits /* (G, kinds) */, int E, int layer) {
    const int G = expert_group.size, mine = E / G, kinds = num_kinds(num_pieces(mine));
    cudaCheck(cudaStreamWaitEvent(comm_stream, copy_event, 0));
    waited(comm_stream);
    collective("exchange of counts", layer, COUNTS, (size_t)(G - 1) * (mine + kinds) * sizeof(int), [&] {
        for (int g = 0; g < G; g++) {
            ncclCheck(ncclSend(counts + g * mine, mine, ncclInt, g, expert_group.comm, comm_stream));
            ncclCheck(ncclSend(visits + g * kinds, kinds, ncclInt, g, expert_group.comm, comm_stream));
            ncclCheck(ncclRecv(arrivals + g * mine, mine, ncclInt, g, expert_group.comm, comm_stream));
            ncclCheck(ncclRecv(arrivals + E + g * kinds, kinds, ncclInt, g, expert_group.comm, comm_stream));
        }
    });
}

// visits_sent, arrived and visits_arrived, after exchange_counts, and where copies wait for dispatch; waits for both
void counts_to_host(RowCounts* rows, const int* visits, const int* arrivals) {
    const size_t E = rows->sent.size(), G = expert_group.size, n = G * num_kinds(num_pieces((int)(E / G)));
    rows->visits_sent.resize(n);
    rows->arrived.resize(E);
    rows->visits_arrived.resize(n);
    copy_to_host(rows->visits_sent.data(), visits, n, copy_stream);
    copy_to_host(rows->arrived.data(), arrivals, E, comm_stream);
    copy_to_host(rows->visits_arrived.data(), arrivals + E, n, comm_stream);
}

// An array whose rows travel, where they come from, and the bytes of a row
struct RowArray { void* to; const void* from; size_t bytes; };

// The rows of several arrays together, of the visits of these kinds: to the ranks that their tokens visit, or home
void exchange_rows(const std::vector<RowArray>& arrays, const RowCounts& rows, const std::vector<int>& chosen,
                   bool home, const char* name, int layer) {
    const std::vector<int> &sent = rows.visits_sent, &arrived = rows.visits_arrived;
    const int G = expert_group.size, kinds = (int)sent.size() / G;
    size_t leaving = 0, bytes = 0;          // rows that go to other ranks, and the bytes of each
    for (int kind : chosen)
        for (int g = 0; g < G; g++) if (g != expert_group.rank) leaving += (home ? arrived : sent)[g * kinds + kind];
    for (const RowArray& a : arrays) bytes += a.bytes;
    std::vector<size_t> start(G * kinds + 1, 0), start_here(G * kinds + 1, 0);      // of what is sent, of what arrives
    for (int i = 0; i < G * kinds; i++) {
        start[i + 1] = start[i] + sent[i];
        start_here[i + 1] = start_here[i] + arrived[i % G * kinds + i / G];
    }
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
    // Two ranks come to the kinds in the same order, also where the calls are too many for one group of NCCL's.
    const size_t n = std::max<size_t>(1, group_calls / (2 * G * arrays.size()));
    for (size_t begin = 0; begin < chosen.size(); begin += n)
        collective(name, layer, ROWS, begin == 0 ? leaving * bytes : 0, [&] {
            for (size_t i = begin; i < std::min(chosen.size(), begin + n); i++)
                for (int g = 0; g < G; g++) {
                    const int kind = chosen[i], there = g * kinds + kind, here = kind * G + g;
                    if (home) receive(start[there], sent[there], g); else send(start[there], sent[there], g);
                    if (home) send(start_here[here], arrived[there], g);
                    else receive(start_here[here], arrived[there], g);
                }
        });
}

// What has to be there before the experts of a piece can work, with -1 of all visits
void bring_rows(const std::vector<RowArray>& arrays, const RowCounts& rows, int piece, const char* name, int layer) {
    std::vector<int> chosen;
    for (int last = 0; last < (int)rows.pieces.size(); last++)
        for (int first = 0; first <= last; first++)
            if (piece < 0 || first == piece) chosen.push_back(visit_kind(first, last));
    exchange_rows(arrays, rows, chosen, false, name, layer);
}

// What the experts of a piece are the last to add to, back to where its tokens came from
void return_rows(const std::vector<RowArray>& arrays, const RowCounts& rows, int piece, const char* name, int layer) {
    std::vector<int> chosen;
    for (int first = 0; first <= piece; first++) chosen.push_back(visit_kind(first, piece));
    exchange_rows(arrays, rows, chosen, true, name, layer);
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
