# Sets GIT_COMMIT to the commit the sources come from, or to nothing outside a checkout.

set(GIT_COMMIT "")
find_program(GIT_EXECUTABLE git)
# A source archive unpacked inside another repository must not report that one's commit.
if(GIT_EXECUTABLE AND EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/.git)
  execute_process(
    COMMAND ${GIT_EXECUTABLE} describe --always --dirty --abbrev=12 --exclude=*
    WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
    OUTPUT_VARIABLE GIT_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
