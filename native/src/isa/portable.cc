// Vectors of four floats, from which the compiler makes what the machine has.
namespace easydel_ragged::portable {

bool available() { return true; }
bool preferred() { return true; }

}  // namespace easydel_ragged::portable
