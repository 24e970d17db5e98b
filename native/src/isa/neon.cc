// What every aarch64 machine has.
namespace easydel_ragged::neon {

bool available() { return true; }
bool preferred() { return true; }

}  // namespace easydel_ragged::neon
