# find_package(diffnl): the target diffnl::diffnl. A program that is linked against it finds diffnl's operators in
# torch, as exported models expect them. `diffnl.cmake_prefix_path()` says where CMake has to look.
include(CMakeFindDependencyMacro)
find_dependency(Torch)

get_filename_component(_diffnl_folder "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
file(GLOB _diffnl_libraries "${_diffnl_folder}/_C.*so")
list(LENGTH _diffnl_libraries _diffnl_count)
if(NOT _diffnl_count EQUAL 1)
  set(diffnl_FOUND FALSE)
  set(diffnl_NOT_FOUND_MESSAGE "there must be one compiled library beside ${CMAKE_CURRENT_LIST_DIR}; "
                               "got ${_diffnl_count}")
  return()
endif()

# The library with kernels for the GPUs of this torch: diffnl/_load.py chooses in the same way.
foreach(_diffnl_backend cuda hip)
  if(EXISTS "${TORCH_INSTALL_PREFIX}/lib/libtorch_${_diffnl_backend}.so")
    file(GLOB _diffnl_kernels "${_diffnl_folder}/_${_diffnl_backend}.*so")
    if(_diffnl_kernels)
      list(APPEND _diffnl_libraries ${_diffnl_kernels})
    else()
      message(WARNING "diffnl: there is no _${_diffnl_backend}*.so in ${_diffnl_folder}, so tensors on a GPU will "
                      "find no kernels; see diffnl's README for how to build it")
    endif()
  endif()
endforeach()

if(NOT TARGET diffnl::diffnl)
  add_library(diffnl::diffnl INTERFACE IMPORTED)
  # The libraries register operators when they are loaded. A program uses no symbol of them, so a linker that is not
  # told otherwise leaves them out.
  list(JOIN _diffnl_libraries "," _diffnl_libraries)
  set_target_properties(
    diffnl::diffnl PROPERTIES
    INTERFACE_LINK_LIBRARIES "-Wl,--no-as-needed,${_diffnl_libraries},--as-needed;${TORCH_LIBRARIES}"
    INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE_DIRS}"
    INTERFACE_COMPILE_FEATURES cxx_std_20)
endif()
