"""The step machine of the CPU: C++ built by the user's compiler."""
