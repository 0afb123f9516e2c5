# find_package(diffnl): the target diffnl::diffnl. A program that is linked against it finds diffnl's operators in
# torch, as exported models expect them. `diffnl.cmake_prefix_path()` says where CMake has to look.
include(CMakeFindDependencyMacro)
find_dependency(Torch)

file(GLOB _diffnl_library "${CMAKE_CURRENT_LIST_DIR}/../_C*.so")
list(LENGTH _diffnl_library _diffnl_count)
if(NOT _diffnl_count EQUAL 1)
  set(diffnl_FOUND FALSE)
  set(diffnl_NOT_FOUND_MESSAGE "there must be one compiled library beside ${CMAKE_CURRENT_LIST_DIR}; "
                               "got ${_diffnl_count}")
  return()
endif()

if(NOT TARGET diffnl::diffnl)
  add_library(diffnl::diffnl INTERFACE IMPORTED)
  # The library registers its operators when it is loaded. A program uses no symbol of it, so a linker that is not
  # told otherwise leaves it out.
  set_target_properties(
    diffnl::diffnl PROPERTIES
    INTERFACE_LINK_LIBRARIES "-Wl,--no-as-needed,${_diffnl_library},--as-needed;${TORCH_LIBRARIES}"
    INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE_DIRS}"
    INTERFACE_COMPILE_FEATURES cxx_std_20)
endif()
