// Merges the partials of a query token.

void finish_heads(const Problem& p, const Partial* partials, int64_t count, int64_t token, HeadRange heads) {
  const int64_t stride = partial_stride(p);
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    const float sink = p.sinks ? base2_sink(p.sinks[h]) : -kInfinity;
    float most = sink;
    for (int64_t i = 0; i < count; ++i) most = partials[i].maximum[h] > most ? partials[i].maximum[h] : most;
    const float reference = most == -kInfinity ? 0.0f : most;
    float total = p.sinks ? exp2_nonpositive(sink - reference) : 0.0f;
    for (int64_t i = 0; i < count; ++i)
      total += partials[i].total[h] * exp2_nonpositive(partials[i].maximum[h] - reference);
    if (p.lse)
      p.lse[token * p.num_q_heads + h] =
          logsumexp(reference, total, p.sinks && reference == sink ? p.sinks + h : nullptr);
    const float inverse = total > 0 ? value_scale(p, h / p.group()) / total : (total == total ? 0.0f : total);
    for (int64_t i = 0; i < count; ++i)
      partials[i].total[h] = exp2_nonpositive(partials[i].maximum[h] - reference) * inverse;
    with_query_type(p.query_dtype, [&](auto tag) {
      using To = typename decltype(tag)::type;
      To* to = static_cast<To*>(p.output) + (token * p.num_q_heads + h) * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        VecF sum = {};
        for (int64_t i = 0; i < count; ++i)
          sum = fma(load(partials[i].weighted + h * stride + d), splat(partials[i].total[h]), sum);
        if (d + kLanes <= p.head_dim)
          store(to + d, sum);
        else
          store_tail(to + d, sum, p.head_dim - d);
      }
    });
  }
}

void finish(const Problem& p, const Partial* partials, int64_t count, int64_t token) {
  finish_heads(p, partials, count, token, {0, p.num_q_heads});
}
