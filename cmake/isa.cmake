# add_isa_source(TARGET FILE FLAGS...): one file per instruction set, the only file that may use it. It includes no
# torch and no standard container, so no inline function of theirs is ever compiled with its flags.
function(add_isa_source target file)
  string(MAKE_C_IDENTIFIER "${target}_${file}" lib)
  add_library(${lib} OBJECT ${file})
  target_include_directories(${lib} PRIVATE csrc)
  set(optimised -O3)
  if(SADMOE_SANITIZE)
    # Checks in every unrolled access, and debug information of all, take minutes: so checks are calls, and what both
    # sanitizers see is left to AddressSanitizer.
    set(optimised -O1 -g1 -fno-sanitize=null,object-size)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      list(APPEND optimised --param=asan-instrumentation-with-call-threshold=0)
    endif()
    if("-mavx512f" IN_LIST ARGN AND EXISTS /proc/cpuinfo)
      file(STRINGS /proc/cpuinfo flags REGEX "^flags" LIMIT_COUNT 1)
      if(NOT "${flags} " MATCHES " avx512f ")
        list(APPEND optimised -fno-sanitize=all)  # nor can this processor run it
      endif()
    endif()
  endif()
  # Whatever CXXFLAGS says: NaN, and the order of sums, are results.
  target_compile_options(${lib} PRIVATE ${optimised} -fno-fast-math -ffp-contract=off ${ARGN})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${lib}>)
endfunction()
