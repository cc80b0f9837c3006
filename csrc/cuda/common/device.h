// All that a kernel body may use.
#pragma once

#include "cuda/common/async.h"
#include "cuda/common/block.h"
#include "cuda/common/cluster.h"
#include "cuda/common/convert.h"
#include "cuda/common/index.h"
#include "cuda/common/math.h"
#include "cuda/common/memory.h"
#include "cuda/common/mma.h"
#include "cuda/common/warp.h"
