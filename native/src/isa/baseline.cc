// What every x86-64 machine has: SSE2.
namespace easydel_ragged::baseline {

bool available() { return true; }
bool preferred() { return true; }

}  // namespace easydel_ragged::baseline
