// Energy, forces and stress of a frame by an exported potential, without Python:
//
//     evaluate potential.pt2 frame.extxyz
//
// Prints the energy on a line, the stress on three, then the force on each atom, in the units of the potential.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Frame {
  at::Tensor positions, cell, pbc, species;
};

// What stands behind `key=` in the comment line of an extxyz file, with or without quotes; "" if nothing does.
std::string value_of(const std::string& comment, const std::string& key) {
  const size_t found = (" " + comment).find(" " + key + "=");
  if (found == std::string::npos) return "";
  const size_t first = found + key.size() + 1;
  if (comment.at(first) == '"') return comment.substr(first + 1, comment.find('"', first + 1) - first - 1);
  return comment.substr(first, comment.find(' ', first) - first);
}

// The first frame of a file whose columns are species and positions. `numbers` gives each element its number.
Frame read_frame(const std::string& path, const std::map<std::string, int64_t>& numbers) {
  std::ifstream file(path);
  std::string line, comment;
  if (!std::getline(file, line) || !std::getline(file, comment)) throw std::runtime_error("no frame in " + path);
  const int64_t count = std::stoll(line);
  if (const std::string columns = value_of(comment, "Properties"); columns != "species:S:1:pos:R:3")
    throw std::runtime_error("Properties must be species:S:1:pos:R:3; got " + columns);

  std::vector<double> positions, cell;
  std::vector<int64_t> species;
  for (int64_t i = 0; i < count; ++i) {
    std::string element;
    double x, y, z;
    if (!std::getline(file, line) || !(std::istringstream(line) >> element >> x >> y >> z))
      throw std::runtime_error("no atom in line " + std::to_string(i + 3) + " of " + path);
    if (numbers.count(element) == 0) throw std::runtime_error("the potential does not know " + element);
    species.push_back(numbers.at(element));
    positions.insert(positions.end(), {x, y, z});
  }
  std::istringstream lattice(value_of(comment, "Lattice"));
  for (double component; lattice >> component;) cell.push_back(component);
  if (cell.size() != 9) throw std::runtime_error("Lattice must have nine components in " + path);
  const std::string flags = value_of(comment, "pbc");
  std::vector<int64_t> pbc;
  for (const char flag : flags)
    if (flag == 'T' || flag == 'F') pbc.push_back(flag == 'T');
  if (pbc.size() != 3) pbc.assign(3, 1);  // the format's default where there is a lattice

  return {torch::tensor(positions, torch::kFloat64).reshape({count, 3}),
          torch::tensor(cell, torch::kFloat64).reshape({3, 3}), torch::tensor(pbc).to(torch::kBool),
          torch::tensor(species, torch::kInt64)};
}

void print_rows(const at::Tensor& rows) {
  const at::Tensor packed = rows.contiguous();
  const double* row = packed.const_data_ptr<double>();
  for (int64_t k = 0; k < packed.size(0); ++k, row += 3)
    std::printf("%.17g %.17g %.17g\n", row[0], row[1], row[2]);
}

int evaluate(const std::string& package, const std::string& path) {
  torch::inductor::AOTIModelPackageLoader model(package);
  std::map<std::string, int64_t> numbers;
  std::istringstream elements(model.get_metadata().at("elements"));
  for (std::string element; elements >> element;) numbers.emplace(element, static_cast<int64_t>(numbers.size()));

  const Frame frame = read_frame(path, numbers);
  const std::vector<at::Tensor> found = model.run({frame.positions, frame.cell, frame.pbc, frame.species});
  std::printf("%.17g\n", found[0].item<double>());
  print_rows(found[2]);
  print_rows(found[1]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: evaluate potential.pt2 frame.extxyz\n";
    return 2;
  }
  try {
    return evaluate(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << "evaluate: " << error.what() << "\n";
    return 1;
  }
}
