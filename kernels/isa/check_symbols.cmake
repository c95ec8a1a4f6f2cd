# Fails where an object that was compiled for one instruction set defines a symbol that another object may define too.
#
#   cmake -DNM=<nm> -DISA=<set> -P check_symbols.cmake -- <objects of that set>
#
# Of an inline function that several objects define, such as a std::vector's destructor, the linker keeps one copy,
# whichever it meets first. If that is the AVX-512 one, code for every processor calls it, and a processor without
# AVX-512 dies of an illegal instruction. So each symbol must carry the set's own namespace, kl::<set>, in its name.
string(LENGTH "${ISA}" length)
set(objects OFF)
set(shared "")
foreach(index RANGE ${CMAKE_ARGC})
  set(argument "${CMAKE_ARGV${index}}")
  if(argument STREQUAL "--")
    set(objects ON)
  elseif(objects AND NOT argument STREQUAL "")
    execute_process(COMMAND "${NM}" --extern-only --defined-only "${argument}" OUTPUT_VARIABLE symbols
                    RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR "${NM} cannot read ${argument}")
    endif()
    string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
    foreach(symbol IN LISTS symbols)
      if(NOT symbol MATCHES "2kl${length}${ISA}")
        string(APPEND shared "\n  ${symbol} in ${argument}")
      endif()
    endforeach()
  endif()
endforeach()
if(shared)
  message(FATAL_ERROR "Objects compiled for ${ISA} define symbols outside kl::${ISA}, which the linker may choose for "
                      "other processors:${shared}\nKeep std:: and inline functions of other headers out of *-inl.h, or "
                      "move what needs them to a file that is compiled once.")
endif()
