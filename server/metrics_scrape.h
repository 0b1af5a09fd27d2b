// The metrics whose values are read when Prometheus asks, not counted as things happen.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <functional>
#include <utility>
#include <vector>

#include "server/metrics.h"

namespace entropyserve {

std::vector<prometheus::MetricFamily> ScrapeFamilies(const ServerGauges& gauges);

class GaugeCollector final : public prometheus::Collectable {
 public:
  explicit GaugeCollector(std::function<ServerGauges()> gauges) : gauges_(std::move(gauges)) {}
  std::vector<prometheus::MetricFamily> Collect() const override {
    return ScrapeFamilies(gauges_());
  }

 private:
  const std::function<ServerGauges()> gauges_;
};

}  // namespace entropyserve
