# Decides whether CUDA kernels are built and says why.
#
# In:  FLEXIDEPTH_CUDA (AUTO, ON, OFF), FLEXIDEPTH_CUDA_ARCHS, CUDA_SOURCES.
# Out: FLEXIDEPTH_BUILD_CUDA, CUDA_BUILT_SOURCES, CUDA_ARCHS_BUILT, CUDA_CODE (flags of nvcc),
#      CUDA_PLAN (one line of text).
#      With FLEXIDEPTH_BUILD_CUDA the language CUDA is enabled.

set(FLEXIDEPTH_BUILD_CUDA FALSE)
set(CUDA_BUILT_SOURCES "")
set(CUDA_ARCHS_BUILT "")

# The architectures to compile for: the caller's, else this machine's GPUs, else the ones in use.
# The newest one is also kept as PTX, which later GPUs compile when the module is first loaded.
function(flexidepth_cuda_archs nvcc out)
  if(FLEXIDEPTH_CUDA_ARCHS)
    set(${out} "${FLEXIDEPTH_CUDA_ARCHS}" PARENT_SCOPE)
    return()
  endif()
  set(archs "")
  find_program(NVIDIA_SMI nvidia-smi)
  if(NVIDIA_SMI)
    execute_process(
      COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE caps RESULT_VARIABLE failed ERROR_QUIET)
    if(failed EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" archs "${caps}")
      list(TRANSFORM archs REPLACE "\\." "")
      list(REMOVE_DUPLICATES archs)
      list(SORT archs COMPARE NATURAL)
      list(FILTER archs EXCLUDE REGEX "^[1-7].$")  # they lack instructions that the kernels use
    endif()
  endif()
  if(NOT archs)
    execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text ERROR_QUIET)
    string(REGEX MATCH "release ([0-9.]+)" _ "${text}")
    set(archs 80 86 89 90)
    if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.8)
      list(APPEND archs 100 120)
    endif()
  endif()
  list(POP_BACK archs newest)
  list(TRANSFORM archs APPEND "-real")
  list(APPEND archs ${newest})
  set(${out} "${archs}" PARENT_SCOPE)
endfunction()

# Compiler flags for architectures. Devices of one family are assembled from one translation: one for
# each takes longer.
function(flexidepth_cuda_code archs out)
  set(code "")
  foreach(arch ${archs})
    if(NOT arch MATCHES "^([0-9]+)([af]?)(-real|-virtual)?$")
      message(FATAL_ERROR "FLEXIDEPTH_CUDA_ARCHS has '${arch}'; wanted numbers as in 80-real;90")
    endif()
    set(device ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    set(kind "${CMAKE_MATCH_3}")
    set(family ${device})
    if(CMAKE_MATCH_2)
    elseif(CMAKE_MATCH_1 GREATER_EQUAL 90)
      set(family 90)
    elseif(CMAKE_MATCH_1 GREATER_EQUAL 80)
      set(family 80)
    endif()
    if(NOT kind STREQUAL "-virtual")
      list(APPEND code "-gencode=arch=compute_${family},code=sm_${device}")
    endif()
    if(NOT kind STREQUAL "-real")
      list(APPEND code "-gencode=arch=compute_${family},code=compute_${family}")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES code)
  set(${out} "${code}" PARENT_SCOPE)
endfunction()

if(NOT FLEXIDEPTH_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLEXIDEPTH_CUDA is '${FLEXIDEPTH_CUDA}'; wanted AUTO, ON or OFF")
endif()

find_program(NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
  PATHS /usr/local/cuda)
if(NVCC)
  set(nvcc_found "nvcc found at ${NVCC}")
else()
  set(nvcc_found "nvcc not found")
endif()

if(FLEXIDEPTH_CUDA STREQUAL "OFF")
  set(CUDA_PLAN "CPU build (FLEXIDEPTH_CUDA=OFF)")
elseif(NOT CUDA_SOURCES)
  set(CUDA_PLAN "CPU build (no CUDA sources in this version; ${nvcc_found})")
  set(missing "this version has no CUDA sources")
elseif(NOT NVCC)
  set(CUDA_PLAN "CPU build (${nvcc_found}; install the CUDA toolkit or set CUDA_HOME)")
  set(missing "${nvcc_found}; install the CUDA toolkit or set CUDA_HOME")
else()
  flexidepth_cuda_archs(${NVCC} CUDA_ARCHS_BUILT)
  set(CMAKE_CUDA_COMPILER ${NVCC})
  flexidepth_cuda_code("${CUDA_ARCHS_BUILT}" CUDA_CODE)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(CMAKE_CUDA_STANDARD 20)
  enable_language(CUDA)
  set(FLEXIDEPTH_BUILD_CUDA TRUE)
  set(CUDA_BUILT_SOURCES ${CUDA_SOURCES})
  set(CUDA_PLAN "CUDA build (${nvcc_found}; architectures ${CUDA_ARCHS_BUILT})")
endif()
if(FLEXIDEPTH_CUDA STREQUAL "ON" AND NOT FLEXIDEPTH_BUILD_CUDA)
  message(FATAL_ERROR
    "FLEXIDEPTH_CUDA=ON, but ${missing}. Build with FLEXIDEPTH_CUDA=AUTO or OFF for the CPU alone.")
endif()
