// NVTX's names for ranges that profilers show. The fast machine adds up their times for its profile (fast.cpp), by
// path: "step 4/forward/layer 0". In the strict machine they do nothing.
#pragma once

int nvtxRangePushA(const char* name);       // the depth of the range that it opens, from 0
int nvtxRangePop();                         // that of the one that it closes; negative where none is open
